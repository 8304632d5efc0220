"""manifest.json: the digest and size of every file of a folder, so that damage is found.

    {"files": {NAME: {"sha256": ..., "size": ...}}, "format": ..., "sha256": of the rest}

The manifest's own digest and fixed spelling make changes to the manifest visible too.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import msgspec

from tinyllama.errors import CheckpointError, reason
from tinyllama.system import checked
from tinyllama.system.files import sha256_file
from tinyllama.system.threads import together
from tinyllama.system.untrusted import MAX_JSON_BYTES, printable, read_json_file
from tinyllama.tokenizers.files import TRAVELLING

MANIFEST = "manifest.json"
_FORMAT = "tinyllama-checkpoint-1"
_OF_TRAINING = ("optimizer.safetensors", "training_state.json")

# Name -> (SHA-256 in hex, bytes).
Digests = Mapping[str, tuple[str, int]]


def write_manifest(folder: Path, known: Digests) -> None:
    """Describe every file below `folder`; those in `known` are not read.

    Raises CheckpointError where a file is not as long as `known` says, and OSError.
    """
    files = {}
    for path in files_below(folder):
        name, size_bytes = path.relative_to(folder).as_posix(), path.stat().st_size
        sha256, said_bytes = known.get(name) or (sha256_file(path), size_bytes)
        if said_bytes != size_bytes:
            raise CheckpointError(f"{path}: {size_bytes} bytes on disk, {said_bytes} were written")
        files[name] = {"sha256": sha256, "size": size_bytes}
    if missing := sorted(known.keys() - files.keys()):
        raise CheckpointError(f"{folder / missing[0]}: missing right after it was written")
    (folder / MANIFEST).write_bytes(_spelled({"format": _FORMAT, "files": files}))


def verify(folder: str | os.PathLike[str]) -> None:
    """Read every file of a checkpoint and compare it with the manifest.

    Raises CheckpointError that names each damaged file and what was found. Files that the
    manifest does not know are not looked at.
    """
    folder = Path(folder)
    files = read_manifest(folder)
    problems = [p for name in files if (p := _damage(folder / name, *files[name], deep=True))]
    if problems:
        raise CheckpointError("\n".join(problems))


def verify_tokenizer(path: str | os.PathLike[str]) -> None:
    """Compare with the manifest the files of a tokenizer in a model's folder, or one of them; a
    manifest.json of another program, such as a web page's, has no sums of them.

    Raises CheckpointError.
    """
    path = Path(path)
    folder, only = (path, TRAVELLING) if path.is_dir() else (path.parent, (path.name,))
    if os.path.lexists(folder / MANIFEST) and _is_of_another_program(folder / MANIFEST):
        return
    verify_loaded(folder, only=only)


def verify_loaded(
    folder: str | os.PathLike[str],
    *,
    remembered: bool = True,
    only: Collection[str] | None = None,
) -> None:
    """Compare with the manifest what is loaded of a model's folder: all but the optimizer's state,
    or the files named by `only`.

    A folder without a manifest is not one of ours, and has no sums. With `remembered`, a large file
    that is as it was when its sum held, within a day, is not read. Raises CheckpointError.
    """
    folder = Path(folder)
    if not os.path.lexists(folder / MANIFEST):
        return
    # What is absent is missed where it is needed: an adapter works without a tokenizer of its own.
    files = {
        name: file
        for name, file in read_manifest(folder).items()
        if name not in _OF_TRAINING
        and (only is None or name in only)
        and os.path.lexists(folder / name)
    }
    found = together(
        lambda name: _damage(folder / name, *files[name], deep=True, remembered=remembered),
        files, work=sum(size for _, size in files.values()),
    )  # fmt: skip
    problems = [problem for problem in found if problem]
    if problems:
        problems.append(
            f"{folder}: not loaded: the disk damaged it, or it was edited after it was saved, and "
            f"then: delete its {MANIFEST}"
        )
        raise CheckpointError("\n".join(problems))


def looks_whole(folder: Path) -> bool:
    """The manifest is intact and every file has its size; nothing else is read."""
    try:
        files = read_manifest(folder)
    except CheckpointError:
        return False
    return not any(_damage(folder / name, *files[name], deep=False) for name in files)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    size: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class _Manifest(msgspec.Struct, forbid_unknown_fields=True):
    """The contents of manifest.json."""

    format: str
    files: dict[str, _File]
    sha256: str


class _Format(msgspec.Struct):
    format: str = ""


def read_manifest(folder: Path) -> dict[str, tuple[str, int]]:
    """Name -> (SHA-256, bytes); raises CheckpointError unless it is exactly as it was written, and
    for names of files that are not in the folder."""
    path = folder / MANIFEST
    kind = read_json_file(path, _Format, CheckpointError, MAX_JSON_BYTES).format
    if kind != _FORMAT:
        raise CheckpointError(f"{path}: format: got {printable(repr(kind), 40)}, must be {_FORMAT}")
    manifest = read_json_file(path, _Manifest, CheckpointError, MAX_JSON_BYTES)
    if path.read_bytes() != _spelled(msgspec.to_builtins(manifest)):
        raise CheckpointError(f"{path}: edited or damaged: its SHA-256 of itself does not hold")
    for name in manifest.files:
        if not _is_inside(name):
            raise CheckpointError(
                f"{path}: {printable(repr(name), 80)} is not the name of a file in the folder"
            )
    return {name: (file.sha256, file.size) for name, file in manifest.files.items()}


def _is_of_another_program(path: Path) -> bool:
    kind = read_json_file(path, _Format, CheckpointError, MAX_JSON_BYTES).format
    return not kind.startswith(_FORMAT.partition("-")[0])


def _is_inside(name: str) -> bool:
    """Whether a name leads to a file in its own folder or one below: no `..`, nothing absolute."""
    path = PurePosixPath(name)
    is_plain = name.isprintable() and "\\" not in name and path.as_posix() == name
    return is_plain and not path.is_absolute() and ".." not in path.parts and path.name != ""


def files_below(folder: Path) -> Iterator[Path]:
    """Every regular file of a folder and of those in it, sorted by path."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _spelled(manifest: Mapping[str, Any]) -> bytes:
    """The one spelling of a manifest, with the sum of everything else in it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    sha256 = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return (json.dumps(rest | {"sha256": sha256}, indent=2, sort_keys=True) + "\n").encode()


def _damage(
    path: Path, sha256: str, size_bytes: int, *, deep: bool, remembered: bool = False
) -> str | None:
    """What is wrong with a file, or None; `deep` reads it, unless a check is `remembered`."""
    try:
        if not path.is_file():
            return f"{path}: missing"
        actual = path.stat().st_size
        if actual != size_bytes:
            wrong = "truncated" if actual < size_bytes else "too long"
            return f"{path}: {wrong}: {actual} bytes, the manifest says {size_bytes}"
        if deep and (digest := _digest(path, remembered)) != sha256:
            return f"{path}: changed: SHA-256 is {digest}, the manifest says {sha256}"
    except OSError as error:
        return f"{path}: cannot be read: {reason(error)}"
    return None


def _digest(path: Path, remembered: bool) -> str:
    def take() -> str:
        return sha256_file(path)

    return checked.digest("sha256", [path], take) if remembered else take()
