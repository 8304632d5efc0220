"""y = silu(gate) * up with silu(g) = g / (1 + exp(-g))  (Shazeer 2020).

Backward, with s = 1 / (1 + exp(-gate)):
    dup = dy gate s,   dgate = dy up s (1 + gate (1 - s)).
"""

from tinygrad import Tensor

from tinyllama.ops import forms
from tinyllama.ops.gpu import swiglu as gpu
from tinyllama.runtime import blocks
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
    dialect, dtype = blocks.language(gate)
    forward = gpu.forward(dialect, gate.numel(), dtype)
    backward = gpu.backward(dialect, gate.numel(), dtype)

    def gradient(dy: Tensor, call: Call) -> list[Tensor | None]:
        gate, up = call.inputs
        dgate, dup = blocks.run(backward, empty_like(gate, up), [dy, gate, up])
        return [dgate, dup]

    return blocks.run(forward, empty_like(gate), [gate, up], gradient)[0]
