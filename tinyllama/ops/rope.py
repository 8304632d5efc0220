"""Rotary position embedding (Su et al. 2021), with Hugging Face's half rotation.

Pair (x_i, x_{i+D/2}) at position t is rotated by the angle t * theta^(-2i/D). The gradient is
a rotation by the negative angle.
"""

import numpy as np
from tinygrad import Tensor

from tinyllama.ops import forms
from tinyllama.ops.gpu import rope as gpu
from tinyllama.runtime import blocks
from tinyllama.runtime.c_kernel import Kernel, run
from tinyllama.runtime.kernel import TYPE_CODE, Call, empty, empty_like


def frequencies(head_dim: int, theta: float) -> np.ndarray:
    """theta^(-2i/D) for i = 0 .. D/2-1, radians per position, float64: first one 1, falling."""
    return np.asarray(theta, np.float64) ** (
        -np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    )


def tables(head_dim: int, theta: float, length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of position times frequency, each (length, D/2) float32."""
    angles = np.outer(np.arange(length, dtype=np.float64), frequencies(head_dim, theta))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, D) in the activation type; cos, sin (T, D/2) float32 -> like x."""
    return forms.choose(x, cos, sin, portable=_portable, cpu=_cpu, gpu=_gpu)(x, cos, sin)


def _portable(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    T, D = x.shape[1], x.shape[3]
    c, s = cos.reshape(1, T, 1, D // 2), sin.reshape(1, T, 1, D // 2)
    first, second = x[..., : D // 2].float(), x[..., D // 2 :].float()
    turned = Tensor.cat(first * c - second * s, second * c + first * s, dim=-1)
    return turned.cast(x.dtype).contiguous()


def _cpu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    B, T, H, D = x.shape
    defines = {"B": B, "T": T, "HEADS": H, "D": D, "ACT": TYPE_CODE[x.dtype]}
    forward, backward = (
        Kernel("rope.c", defines | {"INVERSE": inverse}, flops=3 * B * T * H * D)
        for inverse in (0, 1)
    )

    def gradient(dy: Tensor, call: Call) -> list[Tensor | None]:
        x, cos, sin = call.inputs
        outputs = [empty(B, T, H, D, dtype=x.dtype, device=x.device)]
        return [run(backward, outputs, [dy, cos, sin])[0], None, None]

    outputs = [empty(B, T, H, D, dtype=x.dtype, device=x.device)]
    return run(forward, outputs, [x, cos, sin], gradient)[0]


def _gpu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    B, T, H, D = x.shape
    dialect, dtype = blocks.language(x)
    forward = gpu.rope(dialect, B, T, H, D, dtype)
    backward = gpu.rope(dialect, B, T, H, D, dtype, inverse=True)

    def gradient(dy: Tensor, call: Call) -> list[Tensor | None]:
        x, cos, sin = call.inputs
        return [blocks.run(backward, empty_like(x), [dy, cos, sin])[0], None, None]

    return blocks.run(forward, empty_like(x), [x, cos, sin], gradient)[0]
