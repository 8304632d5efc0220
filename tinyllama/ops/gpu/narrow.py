"""How weights are narrowed on a GPU, many per launch: see narrow.c."""

from collections.abc import Mapping, Sequence

from tinyllama.ops.gpu import rows
from tinyllama.runtime.blocks import Dialect, DType, Launch

ROUNDS = 4  # vectors per thread of a block
# Two arguments each: Metal has 31 buffers, OpenCL at least 1024 bytes of arguments, CUDA 4096.
MOST_TENSORS: Mapping[Dialect, int] = {"cuda": 200, "metal": 15, "opencl": 60}


def narrow(dialect: Dialect, counts: Sequence[int], dtype: DType) -> Launch:
    """y of each tensor (`counts` numbers of type `dtype`), then x of each (float32)."""
    vec = rows.vector(4, *counts)
    per_block = rows.THREADS * vec * ROUNDS
    entries, blocks = rows.table(counts, per_block)
    numbers = range(len(counts))
    return rows.launch(
        "narrow", dialect,
        {"TENSORS(X)": " ".join(entries), "REST(X)": " ".join(entries[1:]), "ROUNDS": ROUNDS},
        vec=vec, grid=(blocks, 1), dtype=dtype, threads=rows.THREADS,
        arguments=[*(f"y{n}" for n in numbers), *(f"x{n}" for n in numbers)], flops=0,
    )  # fmt: skip
