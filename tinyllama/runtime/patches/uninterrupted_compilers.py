"""Compilers that a Ctrl-C does not reach.

A terminal sends SIGINT to every process of the session's foreground group. A command that goes on
after it, such as training to the end of its step, still needs what clang was compiling.
"""

import subprocess
from functools import partial

from tinygrad.runtime.support import compiler_cpu

from tinyllama.runtime.patches.patch import Patch


class Processes:
    """What tinygrad's compiler uses of `subprocess`, for processes in a session of their own."""

    check_output = staticmethod(partial(subprocess.check_output, start_new_session=True))


def apply() -> None:
    """From here on, clang runs in a session that has no terminal."""
    compiler_cpu.subprocess = Processes


PATCH = Patch(
    name="uninterrupted_compilers",
    replaces=("tinygrad.runtime.support.compiler_cpu.subprocess",),
    why="keeps a terminal's Ctrl-C from ending clang, so that training can finish its step, and the"
    " answers of a chat or a server do not fail",
    test="tests/runtime/test_uninterrupted_compilers.py"
    "::test_training_ends_its_step_after_a_ctrl_c_while_clang_runs",
    apply=apply,
)
