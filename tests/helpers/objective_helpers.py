"""What the tests of objectives share: rows of pairs, and short runs on them or on text."""

import json

from tinyllama.config import config_from_toml
from tinyllama.train.prepare import with_base

LORA = "[lora]\nrank = 4\nalpha = 8.0\ndropout = 0.25\n"
KINDS = {"full": "", "lora": LORA, "qlora": f"{LORA}[qlora]\nblock_size = 32\n"}
ROWS = [
    {"prompt": f"def f{i}(first):", "chosen": f"  # some code {i}", "rejected": " first second"}
    for i in range(9)
]


def write_rows(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_toml(folder, base, objective, kind="full"):
    """A short run on pairs, or on text, with validation and accumulation."""
    write_rows(folder / "pairs.jsonl")
    (folder / "text.txt").write_text("def add(first, second):  # some code\n" * 60)
    data = "text.txt" if objective in ("sft", "distill") else "pairs.jsonl"
    teacher = f'[distillation]\nteacher = "{base}"\n' if objective == "distill" else ""
    return f"""
[model]
base = "{base}"
[training]
objective = "{objective}"
learning_rate = 3e-3
batch_size = 4
micro_batch_size = 2
num_epochs = 4
max_steps = 6
eval_every = 3
seed = 3
[data]
train_path = "{folder / data}"
val_path = "{folder / data}"
context_length = 32
cache_dir = "{folder / "cache"}"
[checkpointing]
save_every = 2
checkpoint_dir = "{folder / "run"}"
{teacher}{KINDS[kind]}"""


def run_config(folder, base, objective, kind="full", *overrides):
    """The same, loaded, with the base's sizes."""
    return with_base(config_from_toml(run_toml(folder, base, objective, kind), "t", overrides))
