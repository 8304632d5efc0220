"""How RMSNorm and its gradients are launched on a GPU: see rms_norm_forward.c, rms_norm_backward.c
and column_sum.c."""

from tinyllama.ops.gpu import rows
from tinyllama.runtime.blocks import Dialect, DType, Launch, itemsize

# Blocks of the gradient, of which each sums its rows' gradient of the weight: 8 for each of the 132
# multiprocessors of an H100, so that reading the sums costs little beside reading the rows.
MOST_BLOCKS = 1056


def forward(dialect: Dialect, N: int, H: int, dtype: DType, eps: float) -> Launch:
    """y, rstd (N,) float32 = rms_norm of x (N, H) with weight (H,) float32.

    Raises UnsupportedSize if a row is too long for a block.
    """
    vec = rows.vector(itemsize(dtype), H)
    threads = rows.row_threads(H, vec)
    return rows.launch(
        "rms_norm_forward", dialect, {"H": H, "EPS": f"{eps!r}f"}, vec=vec, grid=(N, 1),
        dtype=dtype, threads=threads, arguments=("y", "rstd", "x", "w"), flops=4 * N * H,
        shared=threads,
    )  # fmt: skip


def partial_rows(N: int) -> int:
    """Rows of `partial`, the sums that `backward` leaves to `column_sum`."""
    return min(N, MOST_BLOCKS)


def backward(dialect: Dialect, N: int, H: int, dtype: DType, *, addend: bool = False) -> Launch:
    """dx (N, H) [+ addend] and partial (partial_rows(N), H) float32, from dy, x, rstd, w."""
    vec = rows.vector(itemsize(dtype), H)
    threads, blocks = rows.row_threads(H, vec), partial_rows(N)
    macros: dict[str, int | str] = {"N": N, "H": H, "BLOCKS": blocks}
    arguments = ["dx", "partial", "dy", "x", "rstd", "w"]
    if addend:
        macros["ADDEND"] = 1
        arguments.append("addend")
    return rows.launch(
        "rms_norm_backward", dialect, macros, vec=vec, grid=(blocks, 1), dtype=dtype,
        threads=threads, arguments=arguments, flops=10 * N * H, shared=threads,
    )  # fmt: skip


def column_sum(dialect: Dialect, N: int, H: int) -> Launch:
    """sum (H,) = the rows of x (N, H) added up; both float32."""
    threads = 32 * min(16, N)
    return rows.launch(
        "column_sum", dialect, {"ROWS": N, "H": H}, vec=1, grid=(-(-H // 32), 1), dtype="float32",
        threads=threads, arguments=("sum", "x"), flops=N * H, shared=threads,
    )  # fmt: skip
