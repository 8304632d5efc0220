"""manifest.json: the digest and size of every file of a folder, so that damage is found.

    {"files": {NAME: {"sha256": ..., "size": ...}}, "format": ..., "sha256": of the rest}

The manifest's own digest and fixed spelling make changes to the manifest visible too.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tinyllama.errors import CheckpointError, reason
from tinyllama.formats.untrusted import read_json
from tinyllama.system.files import sha256_file

MANIFEST = "manifest.json"
_FORMAT = "tinyllama-checkpoint-1"

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


def looks_whole(folder: Path) -> bool:
    """The manifest is intact and every file has its size; nothing else is read."""
    try:
        files = read_manifest(folder)
    except CheckpointError:
        return False
    return not any(_damage(folder / name, *files[name], deep=False) for name in files)


def read_manifest(folder: Path) -> dict[str, tuple[str, int]]:
    """Name -> (SHA-256, bytes); raises CheckpointError unless it is exactly as it was written."""
    path = folder / MANIFEST
    manifest = read_json(path, CheckpointError)
    if manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: format: got {manifest.get('format')!r}, must be {_FORMAT}")
    if path.read_bytes() != _spelled(manifest):
        raise CheckpointError(f"{path}: edited or damaged: its SHA-256 of itself does not hold")
    return {name: (file["sha256"], file["size"]) for name, file in manifest["files"].items()}


def files_below(folder: Path) -> Iterator[Path]:
    """Every regular file of a folder and of those in it, sorted by path."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _spelled(manifest: Mapping[str, Any]) -> bytes:
    """The one spelling of a manifest, with the sum of everything else in it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    sha256 = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return (json.dumps(rest | {"sha256": sha256}, indent=2, sort_keys=True) + "\n").encode()


def _damage(path: Path, sha256: str, size_bytes: int, *, deep: bool) -> str | None:
    """What is wrong with a file, or None; `deep` reads it."""
    try:
        if not path.is_file():
            return f"{path}: missing"
        actual = path.stat().st_size
        if actual != size_bytes:
            wrong = "truncated" if actual < size_bytes else "too long"
            return f"{path}: {wrong}: {actual} bytes, the manifest says {size_bytes}"
        if deep and (digest := sha256_file(path)) != sha256:
            return f"{path}: changed: SHA-256 is {digest}, the manifest says {sha256}"
    except OSError as error:
        return f"{path}: cannot be read: {reason(error)}"
    return None
