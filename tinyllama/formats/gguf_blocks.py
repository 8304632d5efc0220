"""The quantised types of GGUF: how their blocks lie in memory, and their values in float32.

A row consists of whole blocks. d and m are float16, q unsigned; each value is

    Q4_0  (q - 8) d     Q5_0  (q - 16) d     Q8_0  q d (q signed)     blocks of 32
    Q4_1  q d + m       Q5_1  q d + m
    Q4_K, Q5_K  q (d scale) - (dmin minimum), 8 groups of 32            blocks of 256
    Q6_K        (q - 32) (d scale), 16 groups of 16

Source: ggml-common.h and ggml-quants.c of llama.cpp; values equal those of the `gguf` library.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tinyllama.formats.packed import PackedForm, PackedRows

Blocks = npt.NDArray[Any]  # (..., blocks) of a structured type below
Bytes = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float32]

# The types that layers multiply by as they are.
PACKED_TYPES = {
    "Q4_0": PackedForm(4, 32),
    "Q4_1": PackedForm(4, 32, minima=True),
    "Q8_0": PackedForm(8, 32),
}


class BlockType(NamedTuple):
    """A quantised type: its number in GGUF, the values of a block, its memory, its values."""

    number: int
    values: int
    memory: np.dtype[Any]
    widen: Callable[[Blocks], Values]


def widen(kind: str, rows: Bytes) -> Values:
    """rows (n, bytes per row) uint8 of a quantised type -> (n, values per row) float32."""
    blocks = np.ascontiguousarray(rows).view(BLOCK_TYPES[kind].memory)
    # A damaged file may hold an infinite scale; whoever uses the values checks them.
    with np.errstate(invalid="ignore", over="ignore"):
        return BLOCK_TYPES[kind].widen(blocks).reshape(len(rows), -1)


def packed_rows(kind: str, rows: Bytes) -> PackedRows:
    """rows (n, bytes per row) uint8 of one of PACKED_TYPES, rearranged without a loss."""
    blocks = np.ascontiguousarray(rows).view(BLOCK_TYPES[kind].memory)
    scales = np.ascontiguousarray(blocks["d"])
    if kind == "Q8_0":
        return PackedRows(blocks["q"].reshape(len(rows), -1), scales, None)
    q = _nibbles(blocks["q"]).reshape(len(rows), -1, 2)
    packed = q[..., 0] | q[..., 1] << np.uint8(4)
    if kind == "Q4_0":
        return PackedRows(packed ^ np.uint8(0x88), scales, None)  # q - 8 in 4 bits
    return PackedRows(packed, scales, np.ascontiguousarray(blocks["m"]))


def _nibbles(q: Bytes) -> Bytes:
    """(..., n) bytes -> (..., 2n): the low halves, then the high ones."""
    return np.concatenate([q & np.uint8(15), q >> np.uint8(4)], axis=-1)


def _bits(q: npt.NDArray[Any], shifts: range, mask: int) -> Bytes:
    """(..., n) -> (..., len(shifts), n): what each shift brings down."""
    columns = np.arange(shifts.start, shifts.stop, shifts.step, dtype=q.dtype)[:, None]
    bits: Bytes = (q[..., None, :] >> columns & q.dtype.type(mask)).astype(np.uint8)
    return bits


def _f32(values: npt.NDArray[Any]) -> Values:
    return values.astype(np.float32)


def _column(values: npt.NDArray[Any]) -> Values:
    return values.astype(np.float32)[..., None]


def _q4_0(b: Blocks) -> Values:
    return _column(b["d"]) * (_f32(_nibbles(b["q"])) - 8)


def _q4_1(b: Blocks) -> Values:
    return _column(b["d"]) * _f32(_nibbles(b["q"])) + _column(b["m"])


def _q8_0(b: Blocks) -> Values:
    return _column(b["d"]) * _f32(b["q"])


def _fifth_bits(b: Blocks) -> Bytes:
    """q of 5 bits (..., 32), the fifth from the 32 bits of "high"."""
    high = _bits(b["high"][..., None], range(32), 1)[..., 0]
    return _nibbles(b["q"]) | high << np.uint8(4)


def _q5_0(b: Blocks) -> Values:
    return _column(b["d"]) * (_f32(_fifth_bits(b)) - 16)


def _q5_1(b: Blocks) -> Values:
    return _column(b["d"]) * _f32(_fifth_bits(b)) + _column(b["m"])


def _k_values(b: Blocks, q: Bytes) -> Values:
    """Values (..., 8, 32) of Q4_K and Q5_K from q (..., 8, 32).

    The 12 bytes hold 6-bit scales and minima: four of each in the low bits of bytes 0-7, the other
    four in the halves of bytes 8-11 and the two top bits of bytes 0-7.
    """
    low, middle, halves = (b["scales"][..., part, :] for part in range(3))
    top = np.uint8(0x30)
    scale = np.concatenate([low & 63, halves & 15 | low >> 2 & top], axis=-1)
    minimum = np.concatenate([middle & 63, halves >> 4 | middle >> 2 & top], axis=-1)
    d, m = _column(b["d"]) * _f32(scale), _column(b["dmin"]) * _f32(minimum)
    return d[..., None] * _f32(q) - m[..., None]


def _k_nibbles(q: Bytes) -> Bytes:
    """(..., 4, 32) bytes -> (..., 8, 32): of each 32 bytes the low halves, then the high ones."""
    return _bits(q, range(0, 8, 4), 15).reshape(*q.shape[:-2], 8, 32)


def _q4_k(b: Blocks) -> Values:
    return _k_values(b, _k_nibbles(b["q"]))


def _q5_k(b: Blocks) -> Values:
    return _k_values(b, _k_nibbles(b["q"]) | _bits(b["high"], range(8), 1) << np.uint8(4))


def _q6_k(b: Blocks) -> Values:
    shape = (*b.shape, 8, 32)
    low = _bits(b["low"], range(0, 8, 4), 15).reshape(shape)
    high = _bits(b["high"], range(0, 8, 2), 3).reshape(shape)
    q = (_f32(low | high << np.uint8(4)) - 32).reshape(*b.shape, 16, 16)
    return (_column(b["d"]) * _f32(b["scales"]))[..., None] * q


def _memory(*fields: tuple[str, str] | tuple[str, str, Any]) -> np.dtype[Any]:
    return np.dtype(list(fields))


_D, _M = ("d", "<f2"), ("m", "<f2")
_K_SCALES = (("dmin", "<f2"), ("scales", "u1", (3, 4)))

BLOCK_TYPES = {
    "Q4_0": BlockType(2, 32, _memory(_D, ("q", "u1", 16)), _q4_0),
    "Q4_1": BlockType(3, 32, _memory(_D, _M, ("q", "u1", 16)), _q4_1),
    "Q5_0": BlockType(6, 32, _memory(_D, ("high", "<u4"), ("q", "u1", 16)), _q5_0),
    "Q5_1": BlockType(7, 32, _memory(_D, _M, ("high", "<u4"), ("q", "u1", 16)), _q5_1),
    "Q8_0": BlockType(8, 32, _memory(_D, ("q", "i1", 32)), _q8_0),
    "Q4_K": BlockType(12, 256, _memory(_D, *_K_SCALES, ("q", "u1", (4, 32))), _q4_k),
    "Q5_K": BlockType(
        13, 256, _memory(_D, *_K_SCALES, ("high", "u1", 32), ("q", "u1", (4, 32))), _q5_k
    ),
    "Q6_K": BlockType(
        14,
        256,
        _memory(("low", "u1", (2, 64)), ("high", "u1", (2, 32)), ("scales", "i1", 16), _D),
        _q6_k,
    ),
}
