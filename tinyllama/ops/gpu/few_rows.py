"""How the product of a few rows with a weight is launched on a GPU: see few_rows.c."""

from tinyllama.ops.gpu import rows
from tinyllama.ops.gpu.gemm import Packed
from tinyllama.runtime.blocks import (
    TYPE_CODE,
    Dialect,
    DType,
    Launch,
    UnsupportedSize,
    itemsize,
)

MOST_ROWS = 8
GROUPS_TO_FILL = 1056  # of 32 lanes: 8 for each of the 132 multiprocessors of an H100


def product(
    dialect: Dialect,
    R: int,
    N: int,
    K: int,
    dtype: DType,
    weight: DType | Packed,
    *,
    addend: bool = False,
) -> Launch:
    """y (R, N) = x (R, K) W (N, K)^T [+ addend (R, N)], x and y of type `dtype`.

    weight: W's type, or how its integers are packed. Raises UnsupportedSize for more than MOST_ROWS
    rows, or if the packed numbers of a row cannot be read by 16 bytes.
    """
    if R > MOST_ROWS:
        raise UnsupportedSize(f"{R} rows: at most {MOST_ROWS} are few")
    # Neighbours of y share what is read of x, but there must be work for all lanes of a card.
    each = next(n for n in (4, 2, 1) if n == 1 or (n * R <= 16 and N // n >= GROUPS_TO_FILL))
    macros: dict[str, int | str] = {"R": R, "N": N, "K": K, "EACH": each}
    arguments = ["y", "x", "w"]
    if isinstance(weight, Packed):
        if K % weight.group or weight.group % (128 // weight.bits):
            raise UnsupportedSize(
                f"groups of {weight.group} in rows of {K}: they must divide the rows and be "
                f"multiples of {128 // weight.bits}"
            )
        vec = 32 // weight.bits
        macros |= {"BITS": weight.bits, "GROUP": weight.group}
        arguments += ["scales", "minima"] if weight.minimum else ["scales"]
        if weight.minimum:
            macros["MINIMUM"] = 1
    else:
        vec = rows.vector(itemsize(weight), K)
        macros["W_TYPE"] = TYPE_CODE[weight]
    if addend:
        macros["ADDEND"] = 1
        arguments.append("addend")
    groups = -(-N // each)
    threads = min(128, 32 * groups)
    return rows.launch(
        "few_rows", dialect, macros, vec=vec, grid=(-(-groups * 32 // threads), 1), dtype=dtype,
        threads=threads, arguments=arguments, flops=2 * R * N * K, shared=threads,
    )  # fmt: skip
