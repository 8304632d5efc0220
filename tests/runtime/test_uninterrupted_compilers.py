"""Ctrl-C in a terminal while clang runs, which the terminal sends to all of its processes."""

import shutil
import time
from pathlib import Path

import pytest
from chat_helpers import chat_model
from runs_helpers import config_file
from terminal_helpers import Terminal

from tinyllama.train.checkpoint import list_checkpoints

SLOW_CLANG = """#!/bin/sh
[ "$1" = --version ] && exec {clang} "$@"
echo started >> {started}
sleep 0.3
exec {clang} "$@"
"""


def interrupted(folder: Path, *words: object) -> tuple[int, str]:
    """Exit code and words of a command whose terminal gets Ctrl-C while it compiles."""
    started, compiler = folder / "started", folder / "clang"
    compiler.write_text(SLOW_CLANG.format(clang=shutil.which("clang"), started=started))
    compiler.chmod(0o755)
    variables = {"CC": str(compiler), "TINYLLAMA_KERNEL_CACHE": str(folder / "kernels")}
    with Terminal(*words, **variables) as at:
        deadline = time.monotonic() + 60
        while not started.exists() or len(started.read_text().splitlines()) < 4:
            assert time.monotonic() < deadline, at.shown
            time.sleep(0.01)
        at.type("\x03")
        return at.end(), at.shown


def test_training_ends_its_step_after_a_ctrl_c_while_clang_runs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, shown = interrupted(tmp_path, "train", config_file(run))
    assert code == 130 and "Traceback" not in shown and "clang" not in shown
    (saved,) = list_checkpoints(run)
    assert f"stopped after step 1, saved {saved}" in shown.splitlines()[-1]


@pytest.mark.parametrize("words", [["chat"], ["serve", "--port", "0"]])
def test_a_command_that_compiles_before_it_begins_ends_at_once(
    words: list[str], tmp_path: Path
) -> None:
    code, shown = interrupted(tmp_path, words[0], chat_model(), *words[1:])
    assert code == 130 and "Traceback" not in shown and "serving" not in shown
    assert shown.splitlines()[-1].endswith("interrupted")
