"""Hidden names of files and folders that are not complete yet, and when they may be removed.

    .NAME.partial-PID-BOOT-NAMESPACE-RANDOM

PID is the process that writes it, BOOT a digest of the system's boot id (of the host name where
there is none), NAMESPACE the container's process numbers, as the kernel calls them. The process
holds a lock (flock) on it for as long as it is incomplete. A cleaning process removes it

    same boot                     if its lock can be taken: the kernel releases it with the process,
                                  in whatever container
    same boot, a file system      if no process PID is in our container; of another container, a
    without locks                 day after the last write
    another boot, so perhaps      a day after the last write, since not every network file system
    another host                  passes locks on

and never one that another user owns, or whose name is not of this form to its end. Each is made
where nothing was before and never opened through a link, so that a name that was planted leads
nowhere.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tinyllama.errors import TinyllamaError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Errors of a file system without locks; NFS gives EBADF for folders, which cannot be written.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EBADF)
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)  # Windows has no such flag
ABANDONED_SECONDS = 24 * 3600
_NAME = re.compile(r"\..*\.partial-(\d+)-([0-9a-f]{8})-(\d+)-[0-9a-f]{8}", re.DOTALL)

# What this process is writing, for where there are no locks.
_ours: set[str] = set()


@contextmanager
def unfinished(final: Path, create: Callable[[Path], object]) -> Iterator[Path]:
    """A partial name beside `final`, which `create` makes a file or folder of, locked until the
    block ends. The block renames or deletes it. Raises OSError."""
    while True:
        partial = _new_name(final)
        create(partial)
        # A cleaning process may remove it before it is locked: then again, with another name.
        with suppress(FileNotFoundError, BlockingIOError):
            handle = lock(partial)
            if os.path.lexists(partial):
                break
            _close(handle)
    _ours.add(partial.name)
    try:
        yield partial
    except TinyllamaError as error:
        if (message := _named(str(error), partial, final)) == str(error):
            raise
        raise type(error)(message) from error
    finally:
        _ours.discard(partial.name)
        _close(handle)


def _named(message: str, partial: Path, final: Path) -> str:
    """A message about what was being written, by the name that it was to get."""
    for inside in (partial / final.name, partial):
        message = message.replace(str(inside), str(final))
    return message


def discard(path: Path) -> None:
    """Delete a file or folder; it gets a partial name first, so that half of it is never taken
    for the whole. Of a link, only the link. Raises OSError."""
    with unfinished(path, lambda partial: os.rename(path, partial)) as partial:
        _delete(partial)


def create_file(path: Path) -> None:
    """Make an empty file where nothing is, not even a link. Raises OSError."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINKS, 0o666))


def remove_partials(
    parent: str | os.PathLike[str], refused: Callable[[OSError], None] = lambda error: None
) -> list[Path]:
    """Remove what killed processes left half-written directly in `parent`; returns the paths.

    `refused` is called with the error of each that cannot be removed, and it stays.
    """
    gone = []
    for path in sorted(Path(parent).glob(".*.partial-*")):
        try:
            if _remove_abandoned(path):
                gone.append(path)
        except OSError as error:
            error.filename = str(path)
            refused(error)
    return gone


def has_locks() -> bool:
    """Whether this system has locks; a file system may have none all the same."""
    return fcntl is not None


def lock(path: Path) -> int | None:
    """A descriptor that holds the lock on a file or folder; None where there are no locks.

    Raises BlockingIOError if another descriptor holds it, and other OSErrors of opening it.
    """
    if fcntl is None or path.is_symlink():
        return None
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR  # NFS locks what it writes
    return locked(os.open(path, flags | NO_LINKS))


def locked(handle: int) -> int | None:
    """The descriptor once it holds its file's lock; None, and it is closed, where there are no
    locks. Raises BlockingIOError if another descriptor holds it."""
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(handle)
            raise
    os.close(handle)
    return None


class _Owner(NamedTuple):
    """Who writes a partial, by its name."""

    process: int
    boot: str
    namespace: str


def _owner(path: Path) -> _Owner | None:
    match = _NAME.fullmatch(path.name)
    return _Owner(int(match[1]), match[2], match[3]) if match else None


def _remove_abandoned(path: Path) -> bool:
    """Remove a partial whose process is gone; whether it was removed."""
    owner = _owner(path)
    if owner is None or not _is_own(path):  # of another program or user
        return False
    try:
        handle = lock(path)
    except (BlockingIOError, FileNotFoundError, PermissionError):
        return False
    try:
        if not _is_abandoned(path, owner, is_locked=handle is not None):
            return False
        _delete(path)
        return True
    finally:
        _close(handle)


def _is_abandoned(path: Path, owner: _Owner, is_locked: bool) -> bool:
    if owner.boot == _boot():
        if is_locked:
            return True
        if owner.namespace == _namespace():
            is_ours = owner.process == os.getpid()
            return path.name not in _ours if is_ours else not _is_alive(owner.process)
    return time.time() - _last_write(path) > ABANDONED_SECONDS


def _is_own(path: Path) -> bool:
    """Whether this user owns a file; where there are no owners, yes."""
    try:
        return not hasattr(os, "geteuid") or path.lstat().st_uid == os.geteuid()
    except FileNotFoundError:
        return False


def _new_name(final: Path) -> Path:
    owner = f"{os.getpid()}-{_boot()}-{_namespace()}-{secrets.token_hex(4)}"
    return final.with_name(f".{final.name}.partial-{owner}")


def _is_alive(process: int) -> bool:
    """Whether a process of that number runs here, in the container we are in."""
    try:
        os.kill(process, 0)  # signal 0 is not sent
    except PermissionError:  # it runs, as another user
        return True
    except (OSError, OverflowError):
        return False
    return True


@cache
def _boot() -> str:
    """8 hex digits that differ between hosts, and between a host's boots where it has an id."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        import platform

        identity = platform.node()
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def _namespace() -> str:
    """The number of the namespace of process numbers, which a container has its own of."""
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return "0"


def _last_write(path: Path) -> float:
    """When a file, or anything in a folder, was last written, in seconds since 1970."""
    paths = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    times = [path.lstat().st_mtime for path in paths if os.path.lexists(path)]
    return max(times, default=time.time())


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _close(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)
