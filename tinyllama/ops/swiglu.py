"""y = silu(gate) * up with silu(g) = g / (1 + exp(-g))  (Shazeer 2020).

Backward, with s = 1 / (1 + exp(-gate)):
    dup = dy gate s,   dgate = dy up s (1 + gate (1 - s)).
"""

from tinygrad import Tensor
from tinygrad.uop.ops import UOp

from tinyllama.runtime import kernel


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (..., I) in the activation type -> like them; arithmetic in float32."""
    if kernel.uses_kernels(gate, up):
        return _swiglu_cpu(gate, up)
    g = gate.float()
    return (g * g.sigmoid() * up.float()).cast(gate.dtype).contiguous()


def _swiglu_cpu(gate: Tensor, up: Tensor) -> Tensor:
    width = gate.shape[-1]
    defines = {"N": gate.numel() // width, "H": width, "ACT": kernel.TYPE_CODE[gate.dtype]}

    def gradient(grad: UOp, call: UOp) -> tuple[UOp | None, ...]:
        _, g, u = (Tensor(uop) for uop in call.src[1:])
        outputs = [kernel.empty(*g.shape, dtype=g.dtype) for _ in range(2)]
        dgate, dup = kernel.run(
            "swiglu_backward.c", defines, outputs, [Tensor(grad), g, u], flops=15 * g.numel()
        )
        return None, dgate.uop, dup.uop

    outputs = [kernel.empty(*gate.shape, dtype=gate.dtype)]
    return kernel.run(
        "swiglu_forward.c", defines, outputs, [gate, up], flops=8 * gate.numel(), gradient=gradient
    )[0]
