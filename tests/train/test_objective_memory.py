"""The memory estimate beside what real runs on pairs and with a teacher take."""

import json
import os
import re
import subprocess
import sys

import pytest
from lora_helpers import write_base
from objective_helpers import run_toml
from runs_helpers import ROOT

from tinyllama.config import LlamaConfig

SIZES = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    intermediate_size=768,
    max_seq_len=256,
)
MORE = {
    "dpo": ("dpo", "full", []),
    "dpo with adapters": ("dpo", "lora", ["training.checkpoint_activations=true"]),
    "dpo on packed weights": ("dpo", "qlora", ["training.dtype=bfloat16"]),
    "orpo": ("orpo", "full", ["training.micro_batch_size=4"]),
    "distill": ("distill", "lora", ["training.label_smoothing=0.1"]),
    "noise": ("sft", "full", ["training.neftune_alpha=5", "training.z_loss=1e-4"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "base", SIZES)


@pytest.mark.parametrize("name", MORE)
def test_a_real_run_takes_what_was_estimated(name, tmp_path, base):
    objective, kind, more = MORE[name]
    (tmp_path / "run.toml").write_text(run_toml(tmp_path, base, objective, kind))
    check_run(tmp_path, ["training.max_steps=2", *more])


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_rows_of_several_lengths_take_what_was_estimated(micro_batch, tmp_path, base):
    """A row each, of a quarter, half, and all of the context: a graph for each of these lengths."""
    (tmp_path / "run.toml").write_text(run_toml(tmp_path, base, "sft", "full"))
    texts = ["def add(first, second):  # some code\n" * n for n in (1, 3, 6)] * 2
    rows = [json.dumps({"text": f"{n} {text}"}) for n, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    more = [f"data.train_path={tmp_path / 'rows.jsonl'}", "data.val_path=none", "data.pack=false"]
    sizes = ["training.batch_size=2", f"training.micro_batch_size={micro_batch}"]
    check_run(tmp_path, ["training.max_steps=3", *more, *sizes])


def check_run(tmp_path, options):
    """Run a configuration, and compare what it took with what it printed before."""
    words = [sys.executable, str(ROOT / "tests" / "helpers" / "memory_run.py")]
    words += [str(tmp_path / "result.json"), "train", str(tmp_path / "run.toml")]
    for option in ["data.context_length=128", *options]:
        words += ["--set", option]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environ, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    rows = re.findall(r"^(\S.*?) +(-?[\d,]+) +-?[\d.]+ GB$", done.stdout, re.MULTILINE)
    printed = {label: int(number.replace(",", "")) for label, number in rows}
    tensors = printed["total"] - printed["interpreter, libraries, graphs"]
    assert found["tensors"] == pytest.approx(tensors, rel=0.01)
    assert found["resident"] == pytest.approx(printed["total"], rel=0.10)
