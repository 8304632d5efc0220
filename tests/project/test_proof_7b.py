"""The proof of `make proof-7b` at a tenth of its depth, by the same tool: three of 32 layers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "proof_7b.py"
LAYERS, CONTEXT = 3, 32
LAYER = 4 * 4096**2 + 3 * 4096 * 11008  # weights of its seven products


@pytest.fixture(scope="module")
def proof(tmp_path_factory):
    """What the tool printed, and the folder it worked in."""
    work = tmp_path_factory.mktemp("proof") / "work"
    command = [sys.executable, str(TOOL), "--work", str(work), "--steps", "3", "--json"]
    command += ["--context", str(CONTEXT), "--out", str(work / "proof.md")]
    command += [f"--set=model.num_layers={LAYERS}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, work


def test_loss_falls_on_a_packed_base(proof):
    seen = json.loads(proof[0].splitlines()[-1])
    losses = seen["losses"]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    assert losses[-1] < losses[0] - 0.1
    assert seen["proved"] and all(seconds > 0 for seconds in seen["step_seconds"])


def test_resident_memory_is_what_the_run_said_it_would_be(proof):
    seen = json.loads(proof[0].splitlines()[-1])
    estimate = int(re.search(r"^total +([\d,]+)", proof[0], re.M)[1].replace(",", ""))
    # Of so few layers, loading takes most: the head's pages of the file, beside all that is packed.
    head_bytes = 2 * 32000 * 4096
    assert 0.9 * estimate < seen["peak_memory_bytes"] < 1.1 * estimate + head_bytes
    weights = int(re.search(r"^weights +([\d,]+)", proof[0], re.M)[1].replace(",", ""))
    norms = 4 * (2 * LAYERS + 1) * 4096
    assert weights == LAYERS * LAYER // 2 + 2 * 2 * 32000 * 4096 + norms
    # What 29 more layers hold in 4 bits, with their scales, stays under the limit of the whole.
    assert seen["peak_memory_bytes"] + 29 * LAYER * 0.53125 < seen["limit_bytes"]


def test_the_report_is_written_and_the_weights_are_removed(proof):
    _, work = proof
    text = (work / "proof.md").read_text()
    total = LAYERS * LAYER + 2 * 32000 * 4096 + (2 * LAYERS + 1) * 4096
    assert f"| base parameters, int4 | {total:,} |" in text
    assert f"| adapter parameters, float32 | {LAYERS * 4 * 64 * 2 * 4096:,} |" in text
    names = ["proof.md", "proof.toml", "text.jsonl", "tokenizer.model"]
    assert sorted(path.name for path in work.iterdir()) == names
