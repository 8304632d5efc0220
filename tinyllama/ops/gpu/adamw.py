"""How AdamW's step and the gradient's norm are launched on a GPU: see adamw.c and square_sum.c.

One launch takes many tensors, since most of a model's are too small to fill a GPU.
"""

from collections.abc import Mapping, Sequence

from tinyllama.ops.gpu import rows
from tinyllama.runtime.blocks import Dialect, DType, Launch

ROUNDS = 4  # vectors per thread of a block, see adamw.c
NORM_BLOCKS = (
    528  # partial sums of squares: 4 blocks for each of the 132 multiprocessors of an H100
)
# Tensors per launch: Metal has 31 buffers, OpenCL at least 1024 bytes of arguments, CUDA 4096.
MOST_TENSORS: Mapping[Dialect, int] = {"cuda": 64, "metal": 7, "opencl": 31}


def step(
    dialect: Dialect, counts: Sequence[int], decays: Sequence[bool], dtype: DType = "float32"
) -> Launch:
    """p, m, v of each tensor (float32, `counts` numbers, updated), then its gradient of each, then
    the eight scalars of ops/adamw.py.

    dtype: of the gradients. decays: whether each tensor's weights decay.
    Raises UnsupportedSize for more tensors than a launch takes.
    """
    vec = rows.vector(4, *counts)
    per_block = rows.THREADS * vec * ROUNDS
    entries, blocks = rows.table(counts, per_block, [*map(int, decays)])
    numbers = range(len(counts))
    states = [f"{letter}{n}" for n in numbers for letter in "pmv"]
    return rows.launch(
        "adamw", dialect, {"TENSORS(X)": " ".join(entries), "ROUNDS": ROUNDS}, vec=vec,
        grid=(blocks, 1), dtype=dtype, threads=rows.THREADS,
        arguments=[*states, *(f"g{n}" for n in numbers), "scalars"], flops=12 * sum(counts),
        updates=True,
    )  # fmt: skip


def square_sum(
    dialect: Dialect, counts: Sequence[int], dtype: DType = "float32", *, accumulate: bool = False
) -> Launch:
    """parts (NORM_BLOCKS,) float32 [+]= sums of squares of tensors of `counts` numbers."""
    vec = rows.vector(4, *counts)
    entries = " ".join(f"X({number}, {count})" for number, count in enumerate(counts))
    macros: dict[str, int | str] = {"TENSORS(X)": entries, "BLOCKS": NORM_BLOCKS}
    if accumulate:
        macros["ACCUMULATE"] = 1
    return rows.launch(
        "square_sum", dialect, macros, vec=vec, grid=(NORM_BLOCKS, 1), dtype=dtype,
        threads=rows.THREADS, arguments=["parts", *(f"x{n}" for n in range(len(counts)))],
        flops=2 * sum(counts), shared=rows.THREADS, updates=accumulate,
    )  # fmt: skip
