"""Checkpoints that are complete or absent: save, list, verify, fall back.

A checkpoint is a folder (`step-00001000`, `final`) with a manifest.json that holds the SHA-256 and
size of every other file, and its own SHA-256. The other files are the caller's.

Saving: the folder is filled under a partial name, fsynced and renamed; only then older ones
are deleted, under a partial name as well. A kill at any moment leaves, besides complete
checkpoints, only hidden names, which `recover` (called by every save) completes or removes:

    .NAME.partial-...   half written or half deleted: removed, if its process is gone (partials.py)
    .NAME.next          whole, was about to replace NAME: takes the name if NAME is absent
    .NAME.old           whole, was replaced by .NAME.next: likewise, after it

What cannot be deleted (an immutable file, NFS with a reader) costs a notice, never the save.

Replacing is one exchange of names where the system can do that (Linux), so that NAME is never
absent; elsewhere two renames, between which only .NAME.old and .NAME.next exist.
"""

import ctypes
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from tinyllama.errors import CheckpointError, reason
from tinyllama.system.files import (
    atomic_directory,
    discard,
    free_name,
    fsync_path,
    make_folder,
    remove_partials,
)
from tinyllama.system.notices import to_stderr
from tinyllama.system.untrusted import read_json_file
from tinyllama.train.manifest import (
    MANIFEST,
    Digests,
    files_below,
    looks_whole,
    verify,
    write_manifest,
)

__all__ = [
    "later_than",
    "latest_valid",
    "list_checkpoints",
    "looks_whole",
    "read_state",
    "recover",
    "save_checkpoint",
    "set_aside",
    "step_name",
    "verify",
    "write_state",
]

STATE = "training_state.json"
_MOST_STATE_BYTES = 1 << 20
BEST = "best"
_STEP = re.compile(r"step-(\d{8,})")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_STEPS = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
_Value = str | int | float | bool | None

_not_removed: set[str] = set()  # what was said to be there still


def step_name(step: int) -> str:
    """Name of the folder saved after `step` optimizer steps."""
    return f"step-{step:08d}"


def save_checkpoint(
    root: str | os.PathLike[str],
    name: str,
    write: Callable[[Path], Digests | None],
    keep_last_n: int | None = None,
    *,
    needed_bytes: int = 0,
) -> Path:
    """Save `root/name`, replacing a checkpoint of that name, and prune old `step-*` folders.

    Anything else of that name (no manifest.json in it) is renamed to `name.aside-1`, not deleted.

    `write` fills the folder it is given; it may return digests of what it wrote, and those files
    are not read again. `needed_bytes` is an estimate, 0 if unknown, compared with the free space
    before anything is written. `keep_last_n` leaves that many `step-*` folders (None: all), the
    new one always among them; it counts and removes only such as look whole, not `best` or `final`.
    Raises CheckpointError, and then `root` holds the checkpoints that it held before.
    """
    assert keep_last_n is None or keep_last_n > 0
    final = Path(root) / name
    try:
        recover(root)
        _check_space(final, needed_bytes)
        replaces = os.path.lexists(final)
        target = _hidden(final, "next") if replaces else final
        with atomic_directory(target) as folder:
            _fill(folder, write, final, needed_bytes)
        if replaces:
            _replace(final, target)
        _prune(final, keep_last_n)
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _no_space(final, needed_bytes) from error
        raise CheckpointError(f"{final}: cannot be saved: {error}") from error
    return final


def recover(root: str | os.PathLike[str]) -> list[Path]:
    """Complete or remove what killed saves left in `root` (see above); returns removed paths.

    Only the process that saves there may call it: for a reader, a save may be in progress.
    """
    gone = remove_partials(root, _say_it_stays)
    for role in ("next", "old"):
        for path in sorted(Path(root).glob(f".*.{role}")):
            if not (path / MANIFEST).is_file():  # a hidden file that is not ours
                continue
            final = path.with_name(path.name[1 : -len(role) - 1])
            if final.exists():
                if _discarded(path):
                    gone.append(path)
            else:
                os.rename(path, final)
                fsync_path(final.parent)
    return gone


def list_checkpoints(root: str | os.PathLike[str]) -> list[Path]:
    """`step-*`, `best` and `final` folders in `root`, damaged ones as well, oldest first.

    `best` and `final` stand after the step that their training_state.json names, or last if it
    names none.
    """
    folders = [path for path in Path(root).glob("*") if path.is_dir() and _age(path) is not None]
    return sorted(folders, key=lambda path: (_age(path), path.name == "final"))


def latest_valid(root: str | os.PathLike[str], warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, or None; damaged ones are named through `warn`.

    Changes nothing on disk.
    """
    for folder in reversed(list_checkpoints(root)):
        try:
            verify(folder)
        except CheckpointError as error:
            warn(f"{error}\n{folder}: damaged, the checkpoint before it is tried")
        else:
            return folder
    return None


def later_than(root: str | os.PathLike[str], step: int) -> list[Path]:
    """Checkpoints in `root` of more than `step` steps, damaged ones as well, oldest first."""
    return [p for p in list_checkpoints(root) if (age := _age(p)) is not None and age > step]


def set_aside(root: str | os.PathLike[str], step: int) -> list[tuple[Path, Path]]:
    """Rename checkpoints of more than `step` steps (`NAME.aside-1`), so that a run that is resumed
    there is not mixed with what followed before; returns old and new names."""
    renames = [(path, free_name(path)) for path in later_than(root, step)]
    for names in renames:
        os.rename(*names)
    if renames:
        fsync_path(Path(root))
    return renames


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write training_state.json: what a run needs besides tensors; must hold its "step"."""
    assert isinstance(state["step"], int)
    text = json.dumps(state, indent=2, sort_keys=True, allow_nan=False)
    (folder / STATE).write_text(f"{text}\n", encoding="utf-8")


class _Anchor(msgspec.Struct):
    step: _STEPS
    share: Annotated[float, msgspec.Meta(ge=0, le=1)]


class _Unvalidated(msgspec.Struct):
    """Metrics of a step whose validation was interrupted; there may be more."""

    step: _STEPS
    loss: float
    lr: float


class _Best(msgspec.Struct):
    """The lowest validation loss, its step, and the validations since."""

    step: _STEPS
    val_loss: float
    since: _STEPS


class _State(msgspec.Struct):
    """What is checked of training_state.json; other keys may stand beside these."""

    step: _STEPS
    data: dict[str, str | int | bool] | None = None
    micro_batch_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 53)] | None = None
    made_with: dict[str, _Value | list[str]] | None = None
    schedule_anchor: _Anchor | None = None
    unvalidated: _Unvalidated | None = None
    best: _Best | None = None
    warmup_steps: _STEPS | None = None
    was_last: bool = False
    watching: dict[str, Any] | None = None


def read_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_state` wrote, checked. Raises CheckpointError."""
    path = Path(folder) / STATE
    read_json_file(path, _State, CheckpointError, _MOST_STATE_BYTES)
    return read_json_file(path, dict[str, Any], CheckpointError, _MOST_STATE_BYTES)


def _fill(
    folder: Path, write: Callable[[Path], Digests | None], final: Path, needed_bytes: int
) -> None:
    try:
        write_manifest(folder, write(folder) or {})
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        # Measured now: the folder is gone when the error has left atomic_directory.
        written_bytes = sum(path.stat().st_size for path in files_below(folder))
        raise _no_space(final, needed_bytes, written_bytes) from error


def _age(folder: Path) -> float | None:
    """Steps that a checkpoint was trained for; None if the folder's name is not a checkpoint's."""
    if match := _STEP.fullmatch(folder.name):
        return int(match[1])
    if folder.name not in ("final", BEST):
        return None
    try:
        step = read_state(folder).get("step")
    except CheckpointError:
        step = None
    # Unknown: taken for the newest, so that `verify` reports what is wrong with it.
    return step if type(step) is int else float("inf")


def _prune(saved: Path, keep_last_n: int | None) -> None:
    steps = [path for path in list_checkpoints(saved.parent) if _STEP.fullmatch(path.name)]
    whole = [path for path in steps if looks_whole(path)]
    for path in whole[: -keep_last_n if keep_last_n else 0]:
        if path != saved:  # after going back, older steps are saved than those there
            _discarded(path)


def _discarded(path: Path) -> bool:
    """Delete a folder; where that fails, say so once and leave it: what was saved is saved."""
    try:
        discard(path)
    except OSError as error:
        error.filename = str(path)
        _say_it_stays(error)
        return False
    return True


def _say_it_stays(error: OSError) -> None:
    # A folder that could be renamed but not deleted has a partial name from then on.
    name = str(error.filename).partition(".partial-")[0].replace("/.", "/")
    if name not in _not_removed:
        _not_removed.add(name)
        to_stderr(f"{name}: cannot be removed and stays: {reason(error)}; the run goes on")


def _replace(final: Path, new: Path) -> None:
    """Give `new` the name `final`, and delete the folder that had that name, if it is ours."""
    ours = (final / MANIFEST).is_file()
    old = new
    if not ours or not _exchange(new, final):
        old = _hidden(final, "old") if ours else free_name(final)
        os.rename(final, old)
        os.rename(new, final)
    fsync_path(final.parent)
    if ours:
        _discarded(old)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:  # an old libc
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    if renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _hidden(final: Path, role: str) -> Path:
    return final.with_name(f".{final.name}.{role}")


def _check_space(final: Path, needed_bytes: int) -> None:
    make_folder(final.parent)
    if _free_bytes(final) < needed_bytes:
        raise _no_space(final, needed_bytes)


def _free_bytes(final: Path) -> int:
    """Free bytes where `final` is to lie: its folder may be what could not be made."""
    there = next(path for path in final.absolute().parents if path.exists())
    return shutil.disk_usage(there).free


def _no_space(final: Path, needed_bytes: int, written_bytes: int = 0) -> CheckpointError:
    free_bytes = _free_bytes(final) + written_bytes
    low = needed_bytes <= written_bytes  # the estimate was
    needed = f"more than {written_bytes}" if low else f"about {needed_bytes}"
    return CheckpointError(
        f"{final}: not enough space: needs {needed} bytes, {free_bytes} bytes are free; "
        "nothing of it was kept"
    )
