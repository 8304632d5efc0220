"""How the loss of logits and its gradient are launched on a GPU: see cross_entropy.c."""

from tinyllama.ops.gpu import rows
from tinyllama.runtime.blocks import Dialect, DType, Launch, itemsize


def softmax_loss(dialect: Dialect, N: int, V: int, dtype: DType, *, gradient: bool) -> Launch:
    """logits (N, V), which become their gradient, and loss (N,) float32, for targets (N,) int32."""
    vec = rows.vector(itemsize(dtype), V)
    threads = min(512, -(-V // vec // 32) * 32)
    return rows.launch(
        "cross_entropy", dialect, {"V": V} | ({"GRADIENT": 1} if gradient else {}), vec=vec,
        grid=(N, 1), dtype=dtype, threads=threads, arguments=("logits", "loss", "targets"),
        flops=6 * N * V, shared=threads, updates=True,
    )  # fmt: skip
