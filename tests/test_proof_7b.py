"""The proof of `make proof-7b` in small: three layers, a quarter as wide, by the same tool."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "proof_7b.py"
SMALL = {"num_layers": 3, "hidden_size": 1024, "num_heads": 8, "intermediate_size": 2816}
SMALL["vocab_size"] = 4096


@pytest.fixture(scope="module")
def proof(tmp_path_factory):
    """What the tool printed, and the folder it worked in."""
    work = tmp_path_factory.mktemp("proof") / "work"
    command = [sys.executable, str(TOOL), "--work", str(work), "--steps", "4", "--context", "128"]
    command += ["--json", "--out", str(work / "proof.md")]
    command += [f"--set=model.{key}={value}" for key, value in SMALL.items()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, work


def test_loss_falls_on_a_packed_base(proof):
    seen = json.loads(proof[0].splitlines()[-1])
    losses = seen["losses"]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
    assert seen["proved"] and all(seconds > 0 for seconds in seen["step_seconds"])


def test_resident_memory_is_what_the_run_said_it_would_be(proof):
    seen = json.loads(proof[0].splitlines()[-1])
    estimate = int(re.search(r"^total +([\d,]+)", proof[0], re.M)[1].replace(",", ""))
    assert seen["peak_memory_bytes"] == pytest.approx(estimate, rel=0.1)
    weights = int(re.search(r"^weights +([\d,]+)", proof[0], re.M)[1].replace(",", ""))
    linear = 3 * (4 * 1024**2 + 3 * 1024 * 2816)
    assert weights == linear // 2 + 2 * 2 * 4096 * 1024 + 4 * 7 * 1024


def test_the_report_is_written_and_the_weights_are_removed(proof):
    _, work = proof
    text = (work / "proof.md").read_text()
    assert "| base parameters, int4 | 46,930,944 |" in text
    assert "| adapter parameters, float32 | 1,572,864 |" in text
    names = ["proof.md", "proof.toml", "text.jsonl", "tokenizer.model"]
    assert sorted(path.name for path in work.iterdir()) == names
