"""How swiglu and its gradients are launched on a GPU: see swiglu.c."""

from collections.abc import Sequence

from tinyllama.ops.gpu import rows
from tinyllama.runtime.blocks import Dialect, DType, Launch, itemsize


def forward(dialect: Dialect, count: int, dtype: DType) -> Launch:
    """y = silu(gate) up, over `count` numbers."""
    return _launch(dialect, "FORWARD", count, dtype, ("y", "gate", "up"), 8)


def backward(dialect: Dialect, count: int, dtype: DType) -> Launch:
    """dgate and dup from dy, gate and up."""
    return _launch(dialect, "BACKWARD", count, dtype, ("dgate", "dup", "dy", "gate", "up"), 15)


def _launch(
    dialect: Dialect, which: str, count: int, dtype: DType, arguments: Sequence[str], flops: int
) -> Launch:
    vec = rows.vector(itemsize(dtype), count)
    threads = rows.threads_for(count // vec)
    return rows.launch(
        "swiglu", dialect, {"COUNT": count, "PASS": which}, vec=vec,
        grid=(-(-count // (vec * threads)), 1), dtype=dtype, threads=threads, arguments=arguments,
        flops=flops * count,
    )  # fmt: skip
