"""How rotary positions are launched on a GPU: see rope.c."""

from tinyllama.ops.gpu import rows
from tinyllama.runtime.blocks import Dialect, DType, Launch, itemsize


def rope(
    dialect: Dialect, B: int, T: int, H: int, D: int, dtype: DType, *, inverse: bool = False
) -> Launch:
    """y = x (B, T, H, D) turned by cos and sin (T, D/2) float32, or back: the gradient."""
    vec = rows.vector(itemsize(dtype), D // 2)
    count = B * T * H * (D // 2 // vec)
    threads = rows.threads_for(count)
    macros = {"B": B, "T": T, "HEADS": H, "D": D, "PASS": "BACKWARD" if inverse else "FORWARD"}
    return rows.launch(
        "rope", dialect, macros, vec=vec, grid=(-(-count // threads), 1), dtype=dtype,
        threads=threads, arguments=("y", "x", "cos", "sin"), flops=3 * B * T * H * D,
        products=(T * D, H * D),
    )  # fmt: skip
