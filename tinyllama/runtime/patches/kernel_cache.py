"""Compiled kernels in a cache of our own (runtime/kernel_cache.py) instead of tinygrad's."""

from typing import Any

from tinygrad.device import Compiler
from tinygrad.helpers import CACHELEVEL

from tinyllama.runtime.kernel_cache import compiled
from tinyllama.runtime.patches.patch import Patch


def apply() -> None:
    """From here on, every compiler of tinygrad keeps its results in our cache, and the database
    that tinygrad keeps them and other things in, as pickles, is never opened."""

    def compile_cached(compiler: Any, source: str) -> bytes:
        return compiled(compiler, source)

    Compiler.compile_cached = compile_cached
    CACHELEVEL.value = 0


PATCH = Patch(
    name="kernel_cache",
    replaces=("tinygrad.device.Compiler.compile_cached",),
    why="keeps compiled kernels in files of their own, each with a sum, in a folder that only the"
    " user can write to; tinygrad's database of pickles runs what is planted there, and a damaged"
    " or full one ends a run",
    test="tests/runtime/test_kernel_cache.py::test_tinygrads_database_is_never_opened",
    apply=apply,
    needed="what is planted in tinygrad's cache.db would be run",
)
