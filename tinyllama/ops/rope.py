"""Rotary position embedding (Su et al. 2021), half rotation as Hugging Face's LLaMA has it.

Pair (x_i, x_{i+D/2}) at position t is turned by the angle t * theta^(-2i/D). A turn by the
negative angle is its gradient.
"""

import numpy as np
from tinygrad import Tensor
from tinygrad.uop.ops import UOp

from tinyllama.runtime import kernel


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
    if kernel.uses_kernels(x, cos, sin):
        return _rope_cpu(x, cos, sin)
    T, D = x.shape[1], x.shape[3]
    c, s = cos.reshape(1, T, 1, D // 2), sin.reshape(1, T, 1, D // 2)
    first, second = x[..., : D // 2].float(), x[..., D // 2 :].float()
    turned = Tensor.cat(first * c - second * s, second * c + first * s, dim=-1)
    return turned.cast(x.dtype).contiguous()


def _rope_cpu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    B, T, H, D = x.shape
    defines = {"B": B, "T": T, "HEADS": H, "D": D, "ACT": kernel.TYPE_CODE[x.dtype]}

    def gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
        dx = kernel.run(
            "rope.c",
            defines | {"INVERSE": 1},
            [kernel.empty(B, T, H, D, dtype=x.dtype)],
            [Tensor(grad), Tensor(call.src[-2]), Tensor(call.src[-1])],
            flops=3 * B * T * H * D,
        )[0]
        return None, dx.uop, None, None

    return kernel.run(
        "rope.c",
        defines | {"INVERSE": 0},
        [kernel.empty(B, T, H, D, dtype=x.dtype)],
        [x, cos, sin],
        flops=3 * B * T * H * D,
        gradient=gradient,
    )[0]
