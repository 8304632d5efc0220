"""Element types of stored weights: their names, their bits, and rounding between the floats.

Names are those of the safetensors format ("F32", "BF16", ...); numpy has no bfloat16, so that its
bits travel in uint16 arrays under the name.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tinyllama.errors import WeightsError

NumpyArray = npt.NDArray[Any]

# Bits of one element, narrowest alignment first: the order is part of the safetensors format.
BITS = (
    {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8}
    | {"F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
    | {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
    | {"C64": 64, "F64": 64, "I64": 64, "U64": 64}
)
# How numpy holds each: the 8-bit floats and BF16 as their bits; F4 and F6 not at all.
NUMPY = (
    {"BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "I32": "<i4"}
    | {"U32": "<u4", "F32": "<f4", "C64": "<c8", "F64": "<f8", "I64": "<i8", "U64": "<u8"}
    | {"BF16": "<u2"}
    | {name: "u1" for name in BITS if name.startswith("F8_")}
)
FLOATS = ("F32", "BF16", "F16")
_NAMES = {
    np.dtype(form): name
    for name, form in NUMPY.items()
    if name != "BF16" and not name.startswith("F8_")
}


@dataclass(frozen=True)
class RawArray:
    """Bits of a type numpy lacks, such as BF16 in a uint16 array of the same number of elements."""

    dtype: str
    shape: tuple[int, ...]
    data: NumpyArray


Array = NumpyArray | RawArray


def bits_of(array: Array) -> NumpyArray:
    """The numpy array that holds the elements."""
    return array.data if isinstance(array, RawArray) else array


def dtype_name(label: str, array: Array) -> str:
    """The format's name of an array's type.

    Raises WeightsError, beginning with `label`, where there is none or a RawArray contradicts
    itself.
    """
    if isinstance(array, np.ndarray):
        name = _NAMES.get(array.dtype.newbyteorder("<"))
        if name is None:
            raise WeightsError(f"{label}: numpy type {array.dtype} has no safetensors name")
        return name
    if array.dtype not in NUMPY or array.data.dtype != np.dtype(NUMPY[array.dtype]):
        raise WeightsError(f"{label}: a {array.data.dtype} array does not hold {array.dtype}")
    if array.data.size != math.prod(array.shape):
        raise WeightsError(f"{label}: {array.data.size} elements for shape {array.shape}")
    return array.dtype


def to_float32(label: str, array: Array) -> npt.NDArray[np.float32]:
    """F32 (as it is), F16 or BF16 as float32, exactly; bfloat16 is the upper half of a float32."""
    dtype, data = dtype_name(label, array), bits_of(array)
    if dtype not in FLOATS:
        raise WeightsError(f"{label}: type {dtype}, must be one of {', '.join(FLOATS)}")
    if dtype != "BF16":
        return data.astype(np.float32, copy=False).reshape(array.shape)
    wide = data.astype(np.uint32)
    return np.left_shift(wide, 16, out=wide).view(np.float32).reshape(array.shape)


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even; NaN stays NaN (quiet, sign kept)."""
    bits = values.view(np.uint32)
    # Adding just under half of the last kept place, and one more if that place is odd, carries
    # exactly when rounding to nearest even goes up. In place: this is most of a save's arithmetic.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = (bits[nan] >> 16) | 0x40
    return rounded.astype(np.uint16)


def convert(label: str, array: Array, target: str) -> NumpyArray:
    """The elements of an array as numpy holds `target`, rounded to nearest even.

    Raises WeightsError for a finite value that `target` would turn into infinity, and for a
    conversion from or to anything but F32, BF16 and F16.
    """
    if dtype_name(label, array) == target:
        return bits_of(array)
    if target not in FLOATS:
        raise WeightsError(f"{label}: {dtype_name(label, array)} cannot be stored as {target}")
    values = to_float32(label, array)
    if target == "BF16":
        stored: NumpyArray = to_bfloat16(values)
        infinite = (stored & 0x7FFF) == 0x7F80
    else:
        with np.errstate(over="ignore"):  # raised below, with the value
            stored = values.astype(NUMPY[target])
        infinite = np.isinf(stored)
    if infinite.any() and (lost := infinite & np.isfinite(values)).any():
        raise WeightsError(f"{label}: {values[lost][0]:g} is too large for {target}")
    return stored
