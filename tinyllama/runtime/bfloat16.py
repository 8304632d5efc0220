"""bfloat16 as 16-bit integers in the C that tinygrad writes itself.

tinygrad's clang renderer names the type __bf16, which clang has on x86 from version 15 on; Debian
12 ships 14. It computes in float32 in any case (it takes the upper half of a float32 by shifts),
so all that is missing is a name for the storage, and constants as their bits.
"""

import numpy as np
from tinygrad import dtypes
from tinygrad.dtype import float_to_bf16
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.uop.ops import Ops, PatternMatcher, UOp, UPat


def store_as_integers() -> None:
    """From here on, C that tinygrad compiles for the CPU needs no __bf16."""

    def constant(ctx: ClangRenderer, const: UOp) -> str:
        bits = int(np.float32(float_to_bf16(const.arg)).view(np.uint32)) >> 16
        return f"((unsigned short){bits}u)"

    ClangRenderer.type_map = {**ClangRenderer.type_map, dtypes.bfloat16: "unsigned short"}
    constants = PatternMatcher([(UPat(Ops.CONST, dtypes.bfloat16, name="const"), constant)])
    ClangRenderer.string_rewrite = constants + ClangRenderer.string_rewrite
