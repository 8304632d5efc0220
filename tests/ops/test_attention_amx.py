"""Attention's kernels for AMX, with its registers in C, so that any machine runs them.

Two references in float64: exact attention, and one that rounds where the kernels do. From the
second only the rounding of the result itself is left, and a few weights whose float32 value lies so
near the middle of two bfloat16 that it is rounded the other way.
"""

import ctypes
import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import amx_in_c
import numpy as np
import pytest
from numpy.typing import NDArray
from tinygrad import Tensor, dtypes

from tinyllama.ops import attention, forms
from tinyllama.runtime import c_kernel
from tinyllama.system import device

Array = NDArray[Any]
TILE = 96  # keys after which the running maximum moves (attention.h)
HALF_UNIT = 2.0**-8  # of bfloat16, relative


def bf16(x: Array) -> Array:
    """Rounded to the nearest bfloat16, ties to even; in the type of x."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32).astype(x.dtype)


def stored(x: Array) -> Array:
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def loaded(x: Array) -> Array:
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def random(*shape: int, seed: int) -> Array:
    return bf16(np.random.default_rng([seed, *shape]).standard_normal(shape))


def recorded(B: int, T: int, H: int, KV: int, D: int) -> list[tuple[str, str, int]]:
    """Of forward and backward: the C text, the name of the function, the floats of its scratch."""
    found = []

    def run(kernel: Any, outputs: Any, inputs: Any, gradient: Any = None) -> Any:
        found.append((kernel.text(), kernel.name, outputs[-1].numel()))
        if gradient is not None:
            gradient(inputs[0], SimpleNamespace(outputs=outputs, inputs=inputs))
        return outputs

    with pytest.MonkeyPatch.context() as patch, forms.forced("cpu"):
        patch.setattr(c_kernel, "has_amx", lambda: True)
        patch.setattr(c_kernel, "source", amx_in_c.source)
        patch.setattr(attention, "run", run)
        shapes = ((B, T, H, D), (B, T, KV, D), (B, T, KV, D))
        qkv = [Tensor.empty(*s, dtype=dtypes.bfloat16, device="CPU") for s in shapes]
        attention.attention(*qkv, Tensor.empty(B, T, dtype=dtypes.int32, device="CPU"))
    return found


def compiled(text: str, name: str, folder: Path) -> Callable[..., None]:
    (folder / f"{name}.c").write_text(text)
    command = ["clang", "-O1", "-fno-math-errno", "-march=native", "-Wno-psabi"]
    command += ["-DVW=16", "-shared", "-fPIC", f"{folder}/{name}.c", "-o", f"{folder}/{name}.so"]
    subprocess.run(command, check=True, timeout=240)
    function: Callable[..., None] = ctypes.CDLL(f"{folder}/{name}.so")[name]
    return function


def by_kernels(
    sizes: tuple[int, ...], given: list[Array], starts: Array, folder: Path
) -> list[Array]:
    """out, lse, dq, dk and dv, thread by thread, from q, k, v and dout."""
    B, T, H, _, _ = sizes
    q, k, v, dout = map(stored, given)
    forward, backward = recorded(*sizes)
    out, lse = np.empty_like(q), np.empty((B, H, T), np.float32)
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    for kernel, outputs, inputs in (
        (forward, [out, lse], [q, k, v, starts]),
        (backward, [dq, dk, dv], [dout, out, lse, q, k, v, starts]),
    ):
        text, name, floats = kernel
        function, scratch = compiled(text, name, folder), np.full(floats, np.nan, np.float32)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (*outputs, scratch, *inputs)]
        for core in range(device.threads()):
            function(*pointers, core)
    return [loaded(out), lse.astype(np.float64), *map(loaded, (dq, dk, dv))]


def reference(
    given: list[Array], starts: Array, out: Array, rounded: Callable[[Array], Array]
) -> list[Array]:
    """The same from float64, with P and dS `rounded`; `out` gives delta, as in the kernels."""
    q, k, v, dout = given
    B, T, H, D = q.shape
    share, scale = H // k.shape[2], 1 / np.sqrt(D)
    results = [np.zeros_like(q), np.zeros((B, H, T)), *map(np.zeros_like, (q, k, v))]
    place = np.arange(T)
    for b, h in itertools.product(range(B), range(H)):
        Q, K, V, dO = q[b, :, h], k[b, :, h // share], v[b, :, h // share], dout[b, :, h]
        seen = (place[None] <= place[:, None]) & (place[None] >= starts[b][:, None])
        S = np.where(seen, Q @ K.T * scale, -1e30)
        o, total, top = np.zeros((T, D)), np.zeros(T), np.full(T, -1e20)
        for key in range(0, T, TILE):
            block = slice(key, key + TILE)
            new = np.maximum(top, S[:, block].max(1))
            P, keep = np.exp(S[:, block] - new[:, None]), np.exp(top - new)
            o = o * keep[:, None] + rounded(P) @ V[block]
            total, top = total * keep + P.sum(1), new
        results[0][b, :, h], results[1][b, h] = o / total[:, None], top + np.log(total)
        P = np.exp(S - results[1][b, h][:, None])
        dS = P * (dO @ V.T - (dO * out[b, :, h]).sum(1)[:, None])
        results[2][b, :, h] = scale * rounded(dS) @ K
        results[3][b, :, h // share] += scale * rounded(dS).T @ Q
        results[4][b, :, h // share] += rounded(P).T @ dO
    return results


def starts_of(T: int, *rows: list[int]) -> Array:
    starts = np.zeros((len(rows), T), np.int32)
    for row, begins in zip(starts, rows, strict=True):
        for begin in begins:
            row[begin:] = begin
    return starts


@pytest.mark.parametrize(
    ("sizes", "documents"),
    [
        ((1, 300, 2, 1, 64), ([0],)),
        ((2, 200, 4, 2, 64), ([0, 1, 40, 96, 100, 190], [0])),
        ((1, 97, 3, 3, 128), ([0, 64],)),
        ((1, 130, 2, 1, 80), ([0, 95, 97],)),
    ],
)
def test_only_p_and_ds_are_rounded(
    sizes: tuple[int, ...], documents: tuple[list[int], ...], tmp_path: Path
) -> None:
    B, T, H, KV, D = sizes
    starts = starts_of(T, *documents)
    shapes = [(B, T, H, D), (B, T, KV, D), (B, T, KV, D), (B, T, H, D)]
    given = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    got = by_kernels(sizes, given, starts, tmp_path)
    exact = reference(given, starts, got[0], lambda x: x)
    same = reference(given, starts, got[0], bf16)
    for name, g, e, s in zip(("out", "lse", "dq", "dk", "dv"), got, exact, same, strict=True):
        unit = 0 if name == "lse" else HALF_UNIT
        largest = max(1, np.abs(e).max())
        assert np.abs(g - e).max() / largest < 1.25 * unit + 3e-6, name
        away = np.abs(g - s) > 1.01 * unit * np.abs(s) + 3e-6 * largest
        assert away.mean() < 0.001, name
