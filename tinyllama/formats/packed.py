"""Packed rows of weights, as layers multiply by them: groups of neighbours share a scale.

w = q scale          q signed: -8 .. 7 (4 bits), -128 .. 127 (8 bits)
w = q scale + min    q unsigned, with minima
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class PackedForm(NamedTuple):
    """How a weight is packed: `block_size` neighbours of a row share a scale, and a minimum."""

    bits: int
    block_size: int
    minima: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether formats/int4.py packs in this form."""
        return self.bits == 4 and not self.minima

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

    def part(self, rows: slice) -> "PackedRows":
        """Some of these rows."""
        minima = None if self.minima is None else self.minima[rows]
        return PackedRows(self.packed[rows], self.scales[rows], minima)


def random_rows(form: PackedForm, shape: Sequence[int], rng: np.random.Generator) -> PackedRows:
    """A random weight (out, in) with a mean near 0 and a deviation of about 0.02."""
    outputs, inputs = shape
    packed = rng.integers(0, 256, (outputs, inputs * form.bits // 8), dtype=np.uint8)
    scale = 0.02 * 12**0.5 / 2**form.bits  # of q that are equally likely
    scales = np.full((outputs, inputs // form.block_size), scale, np.float16)
    middle = np.float16(-(2**form.bits - 1) / 2)
    minima = scales * middle if form.minima else None
    return PackedRows(packed.view(np.int8) if form.bits == 8 else packed, scales, minima)
