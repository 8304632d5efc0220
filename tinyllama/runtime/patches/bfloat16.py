"""bfloat16 as 16-bit integers in the C that tinygrad writes itself.

tinygrad's clang renderer calls the type __bf16, which clang knows on x86 from version 15 on;
Debian 12 ships 14. tinygrad computes in float32 anyway (it takes the upper half of a float32 by
shifts), so all that is missing is a type for the storage, and constants as their bits.
"""

import numpy as np
from tinygrad import dtypes
from tinygrad.dtype import float_to_bf16
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.uop.ops import Ops, PatternMatcher, UOp, UPat

from tinyllama.runtime.patches.patch import Patch


def apply() -> None:
    """From here on, C that tinygrad writes for the CPU contains no __bf16."""

    def constant(ctx: ClangRenderer, const: UOp) -> str:
        bits = int(np.float32(float_to_bf16(const.arg)).view(np.uint32)) >> 16
        return f"((unsigned short){bits}u)"

    ClangRenderer.type_map = {**ClangRenderer.type_map, dtypes.bfloat16: "unsigned short"}
    constants = PatternMatcher([(UPat(Ops.CONST, dtypes.bfloat16, name="const"), constant)])
    ClangRenderer.string_rewrite = constants + ClangRenderer.string_rewrite


PATCH = Patch(
    name="bfloat16",
    replaces=(
        "tinygrad.renderer.cstyle.ClangRenderer.type_map",
        "tinygrad.renderer.cstyle.ClangRenderer.string_rewrite",
    ),
    why="stores bfloat16 as 16-bit integers, because clang before version 15 has no type __bf16",
    needed="clang 14 compiles no bfloat16",
    test="tests/runtime/test_patches.py::test_bfloat16_is_stored_as_integers",
    apply=apply,
)
