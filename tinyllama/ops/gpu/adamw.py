"""How AdamW's step and the gradient's norm are launched on a GPU: see adamw.c and square_sum.c.

One launch takes many tensors, since most of a model's are too small to fill a GPU.
"""

from collections.abc import Mapping, Sequence

from tinyllama.ops.gpu import rows
from tinyllama.runtime.blocks import TYPE_CODE, Dialect, DType, Launch

ROUNDS = 4  # vectors per thread of a block, see adamw.c
NORM_BLOCKS = (
    528  # partial sums of squares: 4 blocks for each of the 132 multiprocessors of an H100
)
# Tensors per launch of the norm, and at most of the step.
MOST_TENSORS: Mapping[Dialect, int] = {"cuda": 64, "metal": 7, "opencl": 31}
# Arguments: Metal has 31 buffers, OpenCL at least 1024 bytes, CUDA 4096.
_MOST_ARGUMENTS: Mapping[Dialect, int] = {"cuda": 512, "metal": 31, "opencl": 128}


def most_tensors(dialect: Dialect, *, state: DType = "float32", copies: bool = False) -> int:
    """How many tensors a launch of `step` takes."""
    each, shared = 4 + copies, 1 + (state != "float32")
    return min(MOST_TENSORS[dialect], (_MOST_ARGUMENTS[dialect] - shared) // each)


def step(
    dialect: Dialect,
    counts: Sequence[int],
    decays: Sequence[bool],
    dtype: DType = "float32",
    *,
    state: DType = "float32",
    copies: Sequence[bool] = (),
    copy: DType = "bfloat16",
) -> Launch:
    """p, m, v of each tensor (`counts` numbers, updated; p float32, m and v of type `state`), the
    copies of p of those that have one (`copies`), in the type `copy`, the gradient of each, the
    scalars of ops/adamw.py, and with a bfloat16 `state` where each tensor's indices begin.

    dtype: of the gradients. decays: whether each tensor's weights decay.
    Raises UnsupportedSize for more tensors than a launch takes.
    """
    vec = rows.vector(4, *counts)
    per_block = rows.THREADS * vec * ROUNDS
    numbers = range(len(counts))
    copied = [n for n in numbers if copies and copies[n]]
    places = [f"c{n}" if n in copied else "0" for n in numbers]
    entries, blocks = rows.table(counts, per_block, [*map(int, decays)], places)
    states = [f"{letter}{n}" for n in numbers for letter in "pmv"]
    macros: dict[str, int | str] = {"TENSORS(X)": " ".join(entries), "ROUNDS": ROUNDS}
    macros |= {"COPIED(X)": " ".join(f"X({n})" for n in copied)}
    macros |= {"COPY_T": TYPE_CODE[copy], "STATE_T": TYPE_CODE[state]}
    arguments = [*states, *(f"c{n}" for n in copied), *(f"g{n}" for n in numbers), "scalars"]
    return rows.launch(
        "adamw", dialect, macros, vec=vec, grid=(blocks, 1), dtype=dtype, threads=rows.THREADS,
        arguments=arguments if state == "float32" else [*arguments, "firsts"],
        flops=12 * sum(counts), updates=True, headers=("../random_bits.h", "rows.h"),
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
