"""What the kernels share whose threads read neighbours of rows (rows.h)."""

import math
from collections.abc import Mapping, Sequence

from tinyllama.runtime import blocks
from tinyllama.runtime.blocks import Dialect, DType, Launch, UnsupportedSize

THREADS = 256  # per block where nothing else is chosen
MOST_COLUMNS = 32  # of a row that a thread keeps in registers


def vector(size: int, *widths: int) -> int:
    """How many neighbours are read at once: a divisor of all widths, at most 16 bytes if an element
    has `size`."""
    return math.gcd(16 // size, *widths)


def row_threads(H: int, vec: int) -> int:
    """Threads of a block that share a row of H; a number that divides the row, if there is one.

    Raises UnsupportedSize if a thread would have more than MOST_COLUMNS.
    """
    vectors, fewest = H // vec, -(-H // MOST_COLUMNS)
    whole = [n for n in range(32, THREADS + 1, 32) if vectors % n == 0 and n >= fewest]
    threads = max(whole, default=threads_for(vectors))
    if threads < fewest:
        raise UnsupportedSize(f"rows of {H}: a block holds at most {THREADS * MOST_COLUMNS}")
    return threads


def threads_for(count: int) -> int:
    """Threads of a block for `count` pieces of work: no more than there are, in groups of 32."""
    return min(THREADS, _rounded(count, 32))


def _rounded(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def table(
    counts: Sequence[int], per_block: int, *columns: Sequence[int | str]
) -> tuple[list[str], int]:
    """Entries X(number, its numbers, its first block, ...) of a text's TENSORS(X), with further
    columns; and the number of blocks, which have `per_block` numbers of one tensor."""
    entries, first = [], 0
    for number, (count, *more) in enumerate(zip(counts, *columns, strict=True)):
        entries.append(f"X({', '.join(map(str, (number, count, first, *more)))})")
        first += -(-count // per_block)
    return entries, first


def launch(
    kernel: str,
    dialect: Dialect,
    macros: Mapping[str, int | str],
    *,
    vec: int,
    grid: tuple[int, int],
    dtype: DType,
    threads: int,
    arguments: Sequence[str],
    flops: int,
    shared: int = 0,
    updates: bool = False,
    headers: Sequence[str] = ("rows.h",),
    products: Sequence[int] = (),
) -> Launch:
    """blocks.launch of a kernel that reads rows.h.

    grid: the numbers of bx and bz. shared: numbers of 4 bytes in a block's shared memory. products:
    see there.
    """
    words = [kernel, dtype, *map(str, macros.values())]
    return blocks.launch(
        kernel,
        dialect,
        {"VEC": vec, **macros},
        name="".join(c if c.isalnum() else "_" for c in "_".join(words))[:100],
        dtype=dtype,
        grid=(grid[0], 1, grid[1]),
        threads=threads,
        arguments=arguments,
        flops=flops,
        shared_bytes=4 * shared,
        updates=updates,
        headers=headers,
        products=products,
    )
