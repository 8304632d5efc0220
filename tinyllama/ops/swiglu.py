"""y = silu(gate) * up with silu(g) = g / (1 + exp(-g))  (Shazeer 2020).

Backward, with s = 1 / (1 + exp(-gate)):
    dup = dy gate s,   dgate = dy up s (1 + gate (1 - s)).
"""

import contextlib

from tinygrad import Tensor

from tinyllama.ops import forms, products
from tinyllama.ops.gpu import swiglu as gpu
from tinyllama.ops.matmul import NN, NT, TN, gemm
from tinyllama.runtime import blocks
from tinyllama.runtime.blocks import UnsupportedSize
from tinyllama.runtime.c_kernel import Kernel, run
from tinyllama.runtime.kernel import TYPE_CODE, Call, empty, empty_like


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (..., I) in the activation type -> like them; arithmetic in float32."""
    return forms.choose(gate, up, portable=_portable, cpu=_cpu, gpu=_gpu)(gate, up)


def _portable(gate: Tensor, up: Tensor) -> Tensor:
    g = gate.float()
    return (g * g.sigmoid() * up.float()).cast(gate.dtype).contiguous()


def _cpu(gate: Tensor, up: Tensor) -> Tensor:
    width, count = gate.shape[-1], gate.numel()
    defines = {"N": count // width, "H": width, "ACT": TYPE_CODE[gate.dtype]}
    forward = Kernel("swiglu_forward.c", defines, flops=8 * count)
    backward = Kernel("swiglu_backward.c", defines, flops=15 * count)

    def gradient(dy: Tensor, call: Call) -> list[Tensor | None]:
        gate, up = call.inputs
        outputs = [empty(*gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2)]
        dgate, dup = run(backward, outputs, [dy, gate, up])
        return [dgate, dup]

    outputs = [empty(*gate.shape, dtype=gate.dtype, device=gate.device)]
    return run(forward, outputs, [gate, up], gradient)[0]


def _gpu(gate: Tensor, up: Tensor) -> Tensor:
    factors = [*products.factors(gate, NT), *products.factors(up, NT)]
    if len(factors) == 4 and factors[0].uop is factors[2].uop:
        x, gate_weight, _, up_weight = factors
        with contextlib.suppress(UnsupportedSize):
            return _of_products(x, gate_weight, up_weight).reshape(gate.shape)
    dialect, dtype = blocks.language(gate)
    forward = gpu.forward(dialect, gate.numel(), dtype)

    def gradient(dy: Tensor, call: Call) -> list[Tensor | None]:
        return [*_gradients(dy, *call.inputs)]

    return blocks.run(forward, empty_like(gate), [gate, up], gradient)[0]


def _of_products(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """silu(x gate_weight^T) x up_weight^T: x (N, in), weights (I, in) -> (N, I)."""

    def gradient(dy: Tensor, call: Call) -> list[Tensor | None]:
        _, gate, up = call.outputs
        x, gate_weight, up_weight = call.inputs
        dgate, dup = _gradients(dy, gate, up)
        dx = gemm(NN, dgate, gate_weight, dtype=x.dtype)
        dx = gemm(NN, dup, up_weight, dtype=x.dtype, addend=dx)
        return [dx, gemm(TN, dgate, x), gemm(TN, dup, x)]

    return products.gated(x, gate_weight, up_weight, gradient)[0]


def _gradients(dy: Tensor, gate: Tensor, up: Tensor) -> list[Tensor]:
    """dgate and dup, by the product that computes dy if there is one."""
    factors = products.factors(dy, NN)
    if len(factors) == 2:
        with contextlib.suppress(UnsupportedSize):
            return products.ungated(factors, gate, up)
    dialect, dtype = blocks.language(gate)
    backward = gpu.backward(dialect, gate.numel(), dtype)
    return blocks.run(backward, empty_like(gate, up), [dy, gate, up])
