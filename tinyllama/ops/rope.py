"""Rotary position embedding (Su et al. 2021), with Hugging Face's half rotation.

Pair (x_i, x_{i+D/2}) at position t is rotated by the angle t f_i, f_i = theta^(-2i/D). The gradient
is a rotation by the negative angle. Models for longer contexts than L, that of their first
training, scale the frequencies by a factor s:

    linear   f_i / s                                            (Chen et al. 2023, arXiv:2306.15595)
    dynamic  theta (s T / L - s + 1)^(D / (D-2)) for theta, in rows of T > L positions  (NTK-aware)
    yarn     f_i (1 - r_i + r_i / s), r_i a ramp from 0 to 1 between the pairs that turn beta_fast
             and beta_slow times in L; cos and sin times 0.1 ln s + 1
                                                                (Peng et al. 2023, arXiv:2309.00071)
    llama3   the same frequencies with r_i = 1 - (L f_i / (2 pi) - low) / (high - low), cut to
             0 .. 1                                                               (Llama 3.1, 2024)
"""

import contextlib
import math

import numpy as np
from tinygrad import Tensor

from tinyllama.config import RopeScaling
from tinyllama.config.rope_scaling import BETA_FAST, BETA_SLOW
from tinyllama.ops import forms, products
from tinyllama.ops.gpu import rope as gpu
from tinyllama.ops.matmul import NN, NT, TN, gemm
from tinyllama.runtime import blocks
from tinyllama.runtime.blocks import UnsupportedSize
from tinyllama.runtime.c_kernel import Kernel, run
from tinyllama.runtime.kernel import TYPE_CODE, Call, empty, empty_like


def frequencies(head_dim: int, theta: float) -> np.ndarray:
    """theta^(-2i/D) for i = 0 .. D/2-1, radians per position, float64: first one 1, falling."""
    return np.asarray(theta, np.float64) ** (
        -np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    )


def scaled_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, length: int
) -> tuple[np.ndarray, float]:
    """The frequencies (D/2,) for rows of `length` positions, and the factor of cos and sin.

    `scaling` states the length of the first training (`LlamaConfig.scaling`).
    """
    if scaling is None:
        return frequencies(head_dim, theta), 1.0
    trained = scaling.original_max_position_embeddings or length
    factor = scaling.factor
    if scaling.rope_type == "dynamic":
        stretch = factor * max(length, trained) / trained - (factor - 1)
        return frequencies(head_dim, theta * stretch ** (head_dim / (head_dim - 2))), 1.0
    plain: np.ndarray = frequencies(head_dim, theta)
    if scaling.rope_type == "linear":
        return plain / factor, 1.0
    if scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        assert low is not None and high is not None  # config/rope_scaling.py
        turns = trained * plain / (2 * math.pi)
        ramp: np.ndarray = np.clip(1 - (turns - low) / (high - low), 0, 1)
        return plain * (1 - ramp + ramp / factor), 1.0
    ramp = _yarn_ramp(head_dim, theta, scaling, trained)
    return plain * (1 - ramp + ramp / factor), _yarn_factor(scaling)


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling, trained: int) -> np.ndarray:
    """How much of each frequency is interpolated, 0 to 1."""

    def pair(turns: float) -> float:
        """The pair, not rounded, that turns so often in `trained` positions."""
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast or BETA_FAST), pair(scaling.beta_slow or BETA_SLOW)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    ramp: np.ndarray = np.clip((np.arange(head_dim // 2) - low) / width, 0, 1)
    return ramp


def _yarn_factor(scaling: RopeScaling) -> float:
    """The factor of cos and sin: attention_factor, or by the paper's rule."""

    def rule(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return rule(scaling.mscale) / rule(scaling.mscale_all_dim)
    return rule(1)


def tables(
    head_dim: int,
    theta: float,
    length: int,
    scaling: RopeScaling | None = None,
    rows: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of position times frequency, each (length, D/2) float32.

    `rows` is the longest row in positions, which dynamic scaling depends on; by default `length`.
    """
    scaled, factor = scaled_frequencies(head_dim, theta, scaling, rows or length)
    angles = np.outer(np.arange(length, dtype=np.float64), scaled)
    cos, sin = factor * np.cos(angles), factor * np.sin(angles)
    return cos.astype(np.float32), sin.astype(np.float32)


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


def turned_for_attention(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rope` on a GPU, for a reader whose gradient is already that of x."""
    B, T, H, D = x.shape
    factors = products.factors(x, NT)
    if factors:
        with contextlib.suppress(UnsupportedSize):
            return _turned_product(factors[0], factors[1], cos, sin, D).reshape(x.shape)
    dialect, dtype = blocks.language(x)

    def gradient(dy: Tensor, call: Call) -> list[Tensor | None]:
        return [dy, None, None]

    launch = gpu.rope(dialect, B, T, H, D, dtype)
    return blocks.run(launch, empty_like(x), [x, cos, sin], gradient)[0]


def _turned_product(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, D: int) -> Tensor:
    """x (N, in) weight (H D, in)^T, each head turned; its gradient is that of the product."""

    def gradient(dy: Tensor, call: Call) -> list[Tensor | None]:
        x, weight, *_ = call.inputs
        return [gemm(NN, dy, weight, dtype=x.dtype), gemm(TN, dy, x), None, None]

    return products.turned(x, weight, cos, sin, D, gradient)


def _gpu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    B, T, H, D = x.shape
    dialect, dtype = blocks.language(x)
    forward = gpu.rope(dialect, B, T, H, D, dtype)
    backward = gpu.rope(dialect, B, T, H, D, dtype, inverse=True)

    def gradient(dy: Tensor, call: Call) -> list[Tensor | None]:
        x, cos, sin = call.inputs
        return [blocks.run(backward, empty_like(x), [dy, cos, sin])[0], None, None]

    return blocks.run(forward, empty_like(x), [x, cos, sin], gradient)[0]
