"""Packed rows of weights, as layers multiply by them: groups of neighbours share a scale.

w = q scale          q signed: -8 .. 7 (4 bits), -128 .. 127 (8 bits)
w = q scale + min    q unsigned, with minima
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class PackedForm(NamedTuple):
    """How a weight is packed: `block_size` neighbours of a row share a scale, and a minimum."""

    bits: int
    block_size: int
    minima: bool = False

    def __str__(self) -> str:
        minima = ", with minima" if self.minima else ""
        return f"{self.bits} bits in groups of {self.block_size}{minima}"


class PackedRows(NamedTuple):
    """Some rows of a packed weight (rows, in).

    packed: (rows, in / 2) uint8, two q of 4 bits per byte, that of the even i in the low half; or
    (rows, in) int8. scales: (rows, in / block_size) float16; minima: like scales, or None.
    """

    packed: npt.NDArray[Any]
    scales: npt.NDArray[np.float16]
    minima: npt.NDArray[np.float16] | None
