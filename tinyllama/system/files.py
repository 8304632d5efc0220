"""Files that are either whole or absent, whenever the power fails.

The order is the one POSIX requires: write beside the target, fsync the data, rename over the
name (atomic within one file system), fsync the folder so that the new name itself is on disk. The
names beside the target are those of partials.py.
"""

import errno
import hashlib
import itertools
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO, TextIO

from tinyllama.system import partials
from tinyllama.system.partials import discard, remove_partials

__all__ = [
    "InUseError",
    "NotRegularError",
    "append_regular",
    "atomic_directory",
    "atomic_write",
    "discard",
    "free_name",
    "fsync_path",
    "held",
    "is_regular",
    "make_folder",
    "naming_file",
    "open_regular",
    "pieces_digest",
    "private_folder",
    "read_file",
    "remove_partials",
    "sha256_file",
]


class InUseError(Exception):
    """Another process holds the folder."""


class NotRegularError(OSError):
    """A name stands for something else than a regular file."""


_READ_BYTES = 1 << 20
_PIECE_BYTES, _BLOCK_BYTES = 8 << 20, 256 << 10


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes, read 1 MiB at a time. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def pieces_digest(
    path: str | os.PathLike[str], look: Callable[[memoryview], None] = lambda data: None
) -> str:
    """Hex BLAKE2b-256 over the BLAKE2b-256 of each 8 MiB of a file, which several threads take
    at once. `look` is called with each 256 KiB. Raises OSError."""
    size = os.stat(path).st_size

    def piece(start: int) -> bytes:
        digest, block = hashlib.blake2b(digest_size=32), memoryview(bytearray(_BLOCK_BYTES))
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            for _ in range(_PIECE_BYTES // _BLOCK_BYTES):
                data = block[: _filled(file, block)]
                digest.update(data)
                look(data)
        return digest.digest()

    starts = range(0, size, _PIECE_BYTES)
    if len(starts) < 2:
        return hashlib.blake2b(b"".join(map(piece, starts)), digest_size=32).hexdigest()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return hashlib.blake2b(b"".join(pool.map(piece, starts)), digest_size=32).hexdigest()


def _filled(file: RawIOBase, block: memoryview) -> int:
    """Fill a block, but for the end of a file; returns its bytes. A read may give fewer."""
    at = 0
    while at < len(block) and (count := file.readinto(block[at:])):
        at += count
    return at


def open_regular(path: str | os.PathLike[str], *, links: bool = True) -> BinaryIO:
    """A regular file, opened for reading; `links` says whether a link is followed. Raises OSError,
    and NotRegularError for anything else that a name may stand for: a folder, a pipe, a device."""
    # Without O_NONBLOCK, opening a pipe waits for its writer.
    flags = os.O_RDONLY | _flag("O_NONBLOCK") | _flag("O_BINARY")
    handle = os.open(path, flags if links else flags | _flag("O_NOFOLLOW"))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise NotRegularError(errno.EINVAL, "Is not a regular file", os.fspath(path))
    return open(handle, "rb")


def is_regular(path: str | os.PathLike[str]) -> bool:
    """Whether a name stands for a regular file, and not for a link to one."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def read_file(path: str | os.PathLike[str], most_bytes: int, *, links: bool = True) -> bytes:
    """All bytes of a regular file, opened by `open_regular`. Raises OSError, also for a file of
    more than `most_bytes`."""
    with open_regular(path, links=links) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            message = f"Has {size} bytes, at most {most_bytes} are read"
            raise OSError(errno.EFBIG, message, os.fspath(path))
        return file.read(size)  # no more, although it may grow; read makes room for so many


def append_regular(path: str | os.PathLike[str]) -> TextIO:
    """A regular file, opened for writing text at its end; made where there is none. Raises
    NotRegularError for anything else, and OSError for a link: a file of a folder from somebody
    else must not lead to another one."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | _flag("O_NONBLOCK") | _flag("O_BINARY")
    with naming_file(path):
        handle = os.open(path, flags | _flag("O_NOFOLLOW"), 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise NotRegularError(errno.EINVAL, "Is not a regular file", os.fspath(path))
    return open(handle, "a", encoding="utf-8")


def free_name(path: Path) -> Path:
    """A free name for something that must not be deleted: `NAME.aside-1`."""
    names = (path.with_name(f"{path.name}.aside-{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def private_folder(folder: Path) -> None:
    """Make a folder that only this user can enter, unless it is there.

    Raises OSError, also where the folder is a link or others own it or may write to it: what they
    put there would be believed.
    """
    make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        fsync_path(folder.parent)
    if not hasattr(os, "geteuid"):  # Windows: the user's profile is private
        return
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "Is not a folder", str(folder))
    if status.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "Belongs to another user", str(folder))
    if status.st_mode & 0o022:
        message = "Other users may write to it: `chmod go-w` it once you trust what it holds"
        raise PermissionError(errno.EPERM, message, str(folder))


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder, with this mode, and those above it that are missing; their names are on disk
    then.

    Raises OSError that says what failed: Path.mkdir says "no such folder" of a full disk.
    """
    missing = [folder]
    while not missing[-1].exists() and missing[-1].parent != missing[-1]:
        missing.append(missing[-1].parent)
    for path in reversed(missing[:-1]):
        try:
            os.mkdir(path, mode if path == folder else 0o777)
        except FileExistsError:
            continue  # another process made it
        fsync_path(path.parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def _flag(name: str) -> int:
    """A flag of open(2), 0 on a system without it."""
    return int(getattr(os, name, 0))


def atomic_write(path: str | os.PathLike[str], data: bytes, *, links: bool = True) -> None:
    """Replace `path` by `data`: a reader, or a crash, sees the old bytes or the new ones.

    The folder must exist. The permissions of a file that is replaced are kept. A link is followed,
    or itself replaced where `links` is false: what a stranger may have planted leads nowhere.
    Raises OSError, and then leaves `path` as it was.
    """
    final = Path(os.path.realpath(path) if links else path)
    # Created as any file is, so that it has the permissions of one.
    with naming_file(final), partials.unfinished(final, partials.create_file) as partial:
        try:
            with open(os.open(partial, os.O_WRONLY | partials.NO_LINKS), "wb") as file:
                file.write(data)
                file.flush()
                if final.exists() and not final.is_symlink():
                    os.chmod(partial, final.stat().st_mode & 0o7777)
                os.fsync(file.fileno())
            os.replace(partial, final)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    fsync_path(final.parent)


@contextmanager
def naming_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an OSError of a write, such as a full disk, name the file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


@contextmanager
def atomic_directory(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a folder to fill; it takes the name `final` only when the block ends without error.

    Every file and folder in it is on disk before the rename. `final` must not exist (else
    FileExistsError, before anything is written); its parents are made. An error in the block
    removes the partial folder and passes on.
    """
    final = Path(final)
    _refuse_existing(final)
    make_folder(final.parent)
    with partials.unfinished(final, Path.mkdir) as partial:
        try:
            yield partial
            _fsync_tree(partial)
            # rename(2) would replace an empty folder that appeared while we were writing.
            _refuse_existing(final)
            os.rename(partial, final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    fsync_path(final.parent)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone, by a lock on `.lock` in it.

    Raises InUseError if another process does, and OSError where `.lock` is a link or no file.
    Without locks in the file system, it is not held.
    """
    path = folder / ".lock"
    with naming_file(path):
        flags = os.O_RDWR | os.O_CREAT | _flag("O_NOFOLLOW") | _flag("O_NONBLOCK")
        handle = os.open(path, flags, 0o666)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(errno.EINVAL, "Is not a regular file: remove it", str(path))
    try:
        kept = partials.locked(handle)
    except BlockingIOError:
        raise InUseError from None
    try:
        yield
    finally:
        if kept is not None:
            os.close(kept)


def _refuse_existing(final: Path) -> None:
    if os.path.lexists(final):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))


def _fsync_tree(root: Path) -> None:
    """fsync every regular file below `root`, then every folder, innermost first."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                fsync_path(path)
        fsync_path(Path(folder))


def fsync_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk; Windows cannot wait for that."""
    if os.name == "nt":  # it opens no folder, and syncs only what is open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
