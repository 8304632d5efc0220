"""How the gradient of an embedding is launched on a GPU: see embedding_order.c and
embedding_backward.c."""

from tinyllama.ops.gpu import rows
from tinyllama.runtime.blocks import Dialect, DType, Launch, itemsize

ENTRIES = 64  # rows of the table per block


def order(dialect: Dialect, N: int, V: int) -> Launch:
    """order (N,) and sorted (N,) int32: the tokens sorted by their ids (N,) in [0, V)."""
    threads = min(128, rows.threads_for(N))
    return rows.launch(
        "embedding_order", dialect, {"N": N, "V": V}, vec=1, grid=(-(-N // threads), 1),
        dtype="float32", threads=threads, arguments=("order", "sorted", "ids"), flops=0,
        shared=threads,
    )  # fmt: skip


def backward(dialect: Dialect, N: int, V: int, H: int, dtype: DType) -> Launch:
    """dw (V, H) float32 = the rows of dout (N, H) summed by id, with the results of `order`."""
    vec = rows.vector(itemsize(dtype), H)
    macros = {"N": N, "V": V, "H": H, "ENTRIES": ENTRIES}
    return rows.launch(
        "embedding_backward", dialect, macros, vec=vec,
        grid=(-(-V // ENTRIES), -(-H // (32 * vec))), dtype=dtype, threads=rows.THREADS,
        arguments=("dw", "dout", "order", "sorted"), flops=N * H, shared=rows.THREADS,
    )  # fmt: skip
