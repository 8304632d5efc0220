"""Arrays with a number per row, whose memory does not grow with the rows: kept in unnamed files.

The file is gone when its array is, or the process ends. It is mapped, so that the system may take
its memory back, and shares it among processes of one run.
"""

import mmap
import weakref
from pathlib import Path
from tempfile import SpooledTemporaryFile, gettempdir
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllama.errors import DataError, reason

_MEMORY_BYTES = 1 << 20  # smaller arrays need no file


class Spool:
    """An array that grows at its end."""

    def __init__(self, folder: Path | None, dtype: str) -> None:
        """`folder`: where the file lies, if one is needed; None for that of temporary files."""
        self._folder, self._dtype = str(folder or gettempdir()), dtype
        self._file = SpooledTemporaryFile(max_size=_MEMORY_BYTES, mode="w+b", dir=self._folder)
        weakref.finalize(self, self._file.close)  # where an error ends what fills it
        self._bytes = 0

    def append(self, values: npt.NDArray[Any]) -> None:
        """Add values. Raises DataError where the disk is full."""
        data = np.ascontiguousarray(values, self._dtype)
        try:
            self._file.write(data.data)
        except OSError as error:
            raise DataError(
                f"{self._folder}: cannot keep there where rows lie: {reason(error)}"
            ) from error
        self._bytes += data.nbytes

    def array(self) -> npt.NDArray[Any]:
        """What was added, read-only; nothing can be added any more."""
        with self._file as file:
            if self._bytes <= _MEMORY_BYTES:
                file.seek(0)
                return np.frombuffer(file.read(), self._dtype)
            file.flush()
            mapped = mmap.mmap(file.fileno(), self._bytes, access=mmap.ACCESS_READ)
            return np.frombuffer(mapped, self._dtype)


def give_back(array: npt.NDArray[Any]) -> None:
    """Let the system take back the memory of what was read of a mapped file so far."""
    if isinstance(array, np.memmap):
        array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
