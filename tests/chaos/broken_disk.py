"""A file whose disk fails: reads of it, mapped ones too, end with EIO as those of a real disk do.

A file system of one file, served over /dev/fuse by a thread of this process. Source of the
protocol: include/uapi/linux/fuse.h, version 7.31.
"""

import contextlib
import ctypes
import errno
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from lab import Skipped

_INIT, _FORGET, _GETATTR, _OPEN, _READ, _RELEASE, _FLUSH = 26, 2, 3, 14, 15, 18, 25
_INTERRUPT, _BATCH_FORGET, _DROP_PAGES = 36, 42, 2
_HEADER, _MODE, _ROOT = 40, 0o100600, 1
_libc = ctypes.CDLL(None, use_errno=True)


class BrokenDisk:
    """The contents of a file, and since when they cannot be read."""

    def __init__(self, data: bytes, device: int) -> None:
        self.failed = 0  # reads that were answered with EIO
        self._data, self._device, self._is_broken = data, device, False

    def breaks(self) -> None:
        """From now on nothing can be read; what the kernel keeps in memory is dropped."""
        self._is_broken = True
        self._send(_DROP_PAGES, 0, struct.pack("<Qqq", _ROOT, 0, -1))

    def serve(self) -> None:
        """Answer the kernel until the file is unmounted."""
        with contextlib.suppress(OSError):
            while True:
                request = os.read(self._device, 1 << 18)
                self._answer(request)
        os.close(self._device)

    def _answer(self, request: bytes) -> None:
        code, unique = struct.unpack_from("<IQ", request, 4)
        if code in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            return
        if code == _INIT:
            self._send(0, unique, struct.pack("<4I2H2I2H8I", 7, 31, 1 << 16, *[0] * 15))
        elif code == _GETATTR:
            size, now = len(self._data), int(os.stat("/").st_mtime)
            attributes = [_ROOT, size, 1 + size // 512, now, now, now, 0, 0, 0, _MODE, 1, 0, 0]
            self._send(0, unique, struct.pack("<Q2I6Q10I", 60, 0, 0, *attributes, 0, 4096, 0))
        elif code == _OPEN:
            self._send(0, unique, bytes(16))
        elif code == _READ:
            at, size = struct.unpack_from("<QI", request, _HEADER + 8)
            self.failed += self._is_broken
            part = self._data[at : at + size]
            self._send(-errno.EIO if self._is_broken else 0, unique, part)
        elif code in (_RELEASE, _FLUSH):
            self._send(0, unique, b"")
        else:
            self._send(-errno.ENOSYS, unique, b"")

    def _send(self, error: int, unique: int, data: bytes) -> None:
        data = b"" if error < 0 else data
        with contextlib.suppress(FileNotFoundError):  # the asker was killed meanwhile
            os.write(self._device, struct.pack("<IiQ", 16 + len(data), error, unique) + data)


@contextlib.contextmanager
def on_a_broken_disk(file: Path) -> Iterator[BrokenDisk]:
    """Another file, with the same contents, over a file; readable until it `breaks`."""
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Skipped(f"no file system in user space: {error}") from None
    disk = BrokenDisk(file.read_bytes(), device)
    options = f"fd={device},rootmode={_MODE:o},user_id=0,group_id=0"
    if _libc.mount(b"chaos", bytes(file), b"fuse", 0, options.encode()):
        os.close(device)
        raise Skipped(f"no file system in user space: {os.strerror(ctypes.get_errno())}")
    serving = threading.Thread(target=disk.serve, daemon=True)
    serving.start()
    try:
        yield disk
    finally:
        _libc.umount2(bytes(file), 2)  # MNT_DETACH
        serving.join(5)
