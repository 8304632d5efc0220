"""Compiled kernels on disk: each under a digest of all that decides it, with a sum of its own.

    key    SHA-256 of source, compiler, flags, processor
    entry  "tinyllama kernel 1\\n", BLAKE2b-256 of key and kernel, the kernel

An entry that does not hold its sum is removed and compiled again. The folder is the user's own and
closed to others, since a kernel is run: one that others could write to is not used. The entries
that were not used for longest are removed where all of them take more than MOST_BYTES. The cache
only saves time, so a full disk or a folder that cannot be made leaves it empty; `problem` says so.
"""

import functools
import hashlib
import hmac
import os
import secrets
import shutil
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinyllama.errors import reason
from tinyllama.system import device, processor
from tinyllama.system.files import private_folder, read_file

MOST_BYTES = 1 << 29  # of all entries
MOST_ENTRY_BYTES = 1 << 26
_MAGIC = b"tinyllama kernel 1\n"
_SUM_BYTES = 32
_USED_SECONDS = 3600  # an entry's time of use is that exact
_ABANDONED_SECONDS = 3600  # for half-written entries of killed processes

_lock = threading.Lock()
_room_bytes: int | None = None  # that this process may still write before it counts again


def key_of(compiler: Any, source: str) -> str:
    """The name of what one of tinygrad's compilers makes of a source."""
    return digest(_identity(compiler), source)


def digest(*parts: str) -> str:
    """A key of parts that together decide a kernel: its source, its compiler, every flag."""
    made_of = hashlib.sha256()
    for part in parts:
        data = part.encode()
        made_of.update(len(data).to_bytes(8, "little") + data)
    return made_of.hexdigest()


def compiled(compiler: Any, source: str) -> bytes:
    """What a compiler of tinygrad makes of a source, from the cache where that has it."""
    if compiler.cachekey is None:  # it makes nothing that is worth a file
        return bytes(compiler.compile(source))
    key = key_of(compiler, source)
    kernel = get(key)
    if kernel is None:
        kernel = bytes(compiler.compile(source))
        put(key, kernel)
    return kernel


def get(key: str) -> bytes | None:
    """The kernel of a key; None if there is none, or a damaged one, which is removed."""
    folder = _folder()[0]
    if folder is None:
        return None
    path = folder / key
    try:
        data = read_file(path, MOST_ENTRY_BYTES, links=False)
    except FileNotFoundError:
        return None
    except OSError:
        data = b""
    kernel = data[len(_MAGIC) + _SUM_BYTES :]
    if not hmac.compare_digest(data, _entry(key, kernel)):
        _remove(path)
        return None
    _mark_used(path)
    return kernel


def put(key: str, kernel: bytes) -> None:
    """Keep a kernel. It appears whole, or not at all; no error if it cannot be written."""
    folder = _folder()[0]
    entry = _entry(key, kernel)
    if folder is None or len(entry) > MOST_ENTRY_BYTES:
        return
    _make_room(folder, len(entry))
    partial = folder / f".new-{secrets.token_hex(8)}"
    try:
        # No fsync: an entry that a power cut tears does not hold its sum.
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "wb") as file:
            file.write(entry)
        os.replace(partial, folder / key)
    except OSError:
        with suppress(OSError):
            partial.unlink()


def problem() -> str | None:
    """Why compiled kernels are not kept, in one line; None if they are."""
    return _folder()[1]


@functools.cache
def _folder() -> tuple[Path | None, str | None]:
    """The folder of the entries, or None and why there is none."""
    folder = device.kernel_cache_folder()
    try:
        private_folder(folder)
    except OSError as error:
        return None, (
            "compiled kernels are not kept, so each start compiles them again: "
            f"{folder}: {reason(error)}; TINYLLAMA_KERNEL_CACHE=DIR names another folder"
        )
    return folder, None


def _entry(key: str, kernel: bytes) -> bytes:
    summed = hashlib.blake2b(kernel, digest_size=_SUM_BYTES, key=bytes.fromhex(key)).digest()
    return _MAGIC + summed + kernel


def _remove(path: Path) -> None:
    """Remove what is no entry, so that one can take its place."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _mark_used(path: Path) -> None:
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > _USED_SECONDS:
            os.utime(path)


def _make_room(folder: Path, size_bytes: int) -> None:
    """Remove the entries that were not used for longest until `size_bytes` more fit."""
    global _room_bytes
    with _lock:
        if _room_bytes is None or _room_bytes < size_bytes:
            _room_bytes = MOST_BYTES - _pruned_bytes(folder, size_bytes)
        _room_bytes -= size_bytes


def _pruned_bytes(folder: Path, size_bytes: int) -> int:
    """Bytes of all entries. Where `size_bytes` more exceed MOST_BYTES, the older half is removed,
    so that this is not done at each one."""
    entries = []
    with suppress(OSError), os.scandir(folder) as found:
        for entry in found:
            with suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                is_entry = not entry.name.startswith(".new-")
                if is_entry or time.time() - status.st_mtime < _ABANDONED_SECONDS:
                    entries.append((status.st_mtime, status.st_size, entry.path))
                elif stat.S_ISREG(status.st_mode):
                    os.unlink(entry.path)
    total = sum(size for _, size, _ in entries)
    if total + size_bytes <= MOST_BYTES:
        return total
    for _, size, path in sorted(entries):
        if total <= MOST_BYTES // 2:
            break
        with suppress(OSError):
            os.unlink(path)
            total -= size
    return total


@functools.lru_cache(maxsize=16)
def _identity(compiler: Any) -> str:
    """A digest of what decides a compiler's result besides the source."""
    kind = f"{type(compiler).__module__}.{type(compiler).__qualname__}"
    parts = [f"tinygrad {device.TINYGRAD}", kind, str(compiler.cachekey)]
    if "native" in str(compiler.cachekey):  # a home folder may be shared by several machines
        described = processor.described()
        parts.append(processor.processor_name())
        parts += [described.get(name, "") for name in ("model name", "flags", "Features")]
    if kind.endswith("ClangJITCompiler"):
        parts.append(device.compiler_identity())
    elif kind.endswith("NVRTCCompiler"):
        parts += [_nvrtc_version(), *map(str, compiler.compile_options)]
    elif kind.endswith("CubinCompiler"):  # its cachekey has NVRTC's version
        parts += map(str, compiler.options)
    return digest(*parts)


@functools.cache
def _nvrtc_version() -> str:
    import ctypes

    from tinygrad.runtime.autogen import nvrtc

    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(major, minor)
    return f"{major.value}.{minor.value}"
