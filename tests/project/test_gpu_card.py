"""tools/gpu_card.py runs to its end, so that nothing trivial stops it where there is a card."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import needs_nvrtc, variables
from runs_helpers import ROOT, environment

pytestmark = needs_nvrtc


def results(folder: Path, *words: str, **more: str) -> tuple[list[dict[str, Any]], str]:
    command = [sys.executable, ROOT / "tools" / "gpu_card.py", "--out", folder, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**more))
    assert done.returncode in (0, 1), done.stderr
    lines = (folder / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], done.stdout


@pytest.mark.parametrize("stage", ["products", "together", "attention", "int4", "decoding"])
def test_every_kernel_is_started_and_checked(stage: str, tmp_path: Path) -> None:
    lines, printed = results(
        tmp_path / "out", "--tiny", "--stages", stage, **variables(tmp_path / "log")
    )
    assert [line for line in lines if "failed" in line] == []
    assert len(lines) > 3
    # Kernels of the fake driver do nothing: every result is found wrong, and nothing else is.
    assert all(not line["error"] < 1e-2 for line in lines)
    assert all(line["spilled"] == 0 for line in lines if "today" in line["what"])
    assert "WRONG" in printed and "failed: 0" in printed


def test_whole_steps_are_run_timed_and_compared(tmp_path: Path) -> None:
    stages = "losses,step,profile"
    lines, printed = results(
        tmp_path / "out", "--tiny", "--stages", stages, **variables(tmp_path / "log")
    )
    assert [line for line in lines if "failed" in line] == []
    assert {line["stage"] for line in lines} == set(stages.split(","))
    for line in lines:
        if line["stage"] == "step":
            assert line["kernels_per_step"] > 30 and line["tokens_per_second"] > 0
        if line["stage"] == "profile":
            assert line["kernels"] > 30 and line["slowest"]
    assert "profile bfloat16: " in printed and "step bfloat16 warm" in printed


def test_without_a_card_kernels_are_compiled(tmp_path: Path) -> None:
    lines, _ = results(tmp_path / "out", "--compile-only", "--stages", "int4")
    assert [line for line in lines if "failed" in line] == []
    assert all(0 < line["registers"] <= 255 for line in lines)


def test_packages_that_a_bare_machine_lacks_are_not_needed() -> None:
    """A card's machine has PyTorch and numpy; tinygrad, msgspec and tomli are brought along."""
    done = subprocess.run(
        [sys.executable, "-c", BARE], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr


BARE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tqdm", "sentencepiece", "tokenizers", "gguf", "huggingface_hub"):
            raise ModuleNotFoundError(f"{name} is not here", name=name)
sys.meta_path.insert(0, Blocked())
import tools.gpu_card
import tinyllama.bench.benchmark, tinyllama.bench.worker_tinyllama
import tinyllama.model.build, tinyllama.train.step, tinyllama.generate.generator
"""


def test_a_stage_that_fails_is_said_with_its_log(tmp_path: Path) -> None:
    missing = variables(tmp_path / "log", FAKE_CUDA_VERSION="12000")
    lines, printed = results(tmp_path / "out", "--tiny", "--stages", "int4", **missing)
    assert [line["failed"] for line in lines] == ["ended with 1, see int4.log"]
    assert "failed: 1" in printed
    assert "does not load what NVRTC" in (tmp_path / "out" / "int4.log").read_text()
