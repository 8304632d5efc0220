"""The demo in short parts that fail if nothing is learned: a base, then LoRA and QLoRA on it.

    train         configs/demo.toml on Python source                     -> .demo/llama/base
    lora, qlora   adapters on that base learn Python's reference manual -> .demo/llama/lora, qlora

python tools/demo_llama.py train|lora|qlora --budget 20      exit code 1 if a check fails

Adapters must lower the loss on held-out text, and the merged model must have the same loss as base
and adapter.
"""

import argparse
import json
import os
import pydoc_data.topics
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import demo
import demo_corpus

from tinyllama.cli.arguments import exit_code, leave, seconds
from tinyllama.convert.merge import merge, parse_adapter
from tinyllama.errors import TinyllamaError
from tinyllama.observe.metrics import read_metrics

FOLDER = demo.DEMO / "llama"
BASE = FOLDER / "base" / "final"
SOURCE_PART = FOLDER / "source_val.jsonl"
TEXT, HELD_OUT = FOLDER / "topics.jsonl", FOLDER / "topics_val.jsonl"
HELD_OUT_ONE_IN = 10
ADAPTERS = {
    "lora.rank": "8",
    "lora.alpha": "16",
    "lora.target_modules": "all-linear",
    "data.tokenizer": "none",  # that of the base
    "data.train_path": str(TEXT),
    "data.val_path": "none",  # held-out text is for the checks
    "training.num_epochs": "20",
}
PACKED = {"qlora.quantize_base": "true", "qlora.block_size": "16"}
MERGED_MAY_DIFFER = 1e-4  # nats per token: merged weights are summed in another order


class Failed(Exception):
    """A check that failed; its message says which."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 if a check fails, or that of a command that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=["train", "lora", "qlora"])
    parser.add_argument("--budget", type=seconds, default=20, help="seconds of each training")
    options = parser.parse_args(arguments)
    os.chdir(demo.ROOT)  # the configuration's paths start there
    try:
        if options.part == "train" or not BASE.exists():
            train_base(options.budget)
        if options.part != "train":
            train_adapters(options.part, options.budget)
    except demo.Stopped as stopped:
        return int(stopped.args[0])
    except (Failed, TinyllamaError) as error:
        print(f"demo_llama: {error}", file=sys.stderr)
        return 1
    return 0


def train_base(budget_seconds: float) -> None:
    """Train the demo's model for a short while; its loss must fall."""
    demo.say(f"The base: {demo.CONFIG} for {budget_seconds:g} seconds")
    if demo_corpus.main([str(demo.DEMO)]) != 0:
        raise demo.Stopped(2)
    FOLDER.mkdir(parents=True, exist_ok=True)
    demo.write_part(demo.HELD_OUT, SOURCE_PART)
    settings = {"data.val_path": str(SOURCE_PART), "training.eval_every": "1000000"}
    trained("base", budget_seconds, settings)
    check_falls([row["loss"] for row in read_metrics(FOLDER / "base" / "metrics.jsonl")])


def train_adapters(kind: str, budget_seconds: float) -> None:
    """Adapters on the base, packed or not: train, evaluate, merge, evaluate again."""
    demo.say(f"{kind} on {BASE} for {budget_seconds:g} seconds")
    write_topics()
    before = held_out_loss(BASE)
    settings = ADAPTERS | {"model.base": str(BASE)} | (PACKED if kind == "qlora" else {})
    trained(kind, budget_seconds, settings)
    adapter, merged = FOLDER / kind / "final", FOLDER / kind / "merged"
    after = held_out_loss(adapter)
    merge(BASE, [parse_adapter(str(adapter))], merged)
    check_adapters(before, after, held_out_loss(merged))


def trained(name: str, budget_seconds: float, settings: dict[str, str]) -> None:
    """Train into .demo/llama/NAME, without resuming."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    settings = {**settings, "checkpointing.checkpoint_dir": str(folder)}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    demo.tinyllama("train", demo.CONFIG, "--budget", f"{budget_seconds:g}", *words)
    if not (folder / "final").exists():
        raise demo.Stopped(130)  # Ctrl-C: the run itself prints how to continue


def write_topics() -> None:
    """Write the chapters of Python's reference that `help()` shows, one in ten held out."""
    rows = [json.dumps({"text": text}) for _, text in sorted(pydoc_data.topics.topics.items())]
    for path, is_in in ((TEXT, False), (HELD_OUT, True)):
        chosen = [row for n, row in enumerate(rows) if (n % HELD_OUT_ONE_IN == 0) == is_in]
        path.write_text("\n".join(chosen) + "\n", encoding="utf-8")


def held_out_loss(model: Path) -> float:
    """Loss in nats a token on the held-out chapters, by `tinyllama evaluate`."""
    words = ("--data", str(HELD_OUT), "--cache-dir", str(demo.DEMO / "cache"), "--batch", "8")
    said = demo.tinyllama("evaluate", "--model", str(model), *words, capture=True)
    return float(json.loads(said)["loss"])


def check_falls(losses: Sequence[float]) -> None:
    """The last tenth of a run's steps must have a lower loss than the first tenth."""
    part = max(1, len(losses) // 10)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    print(f"training loss    {first:.3f} -> {last:.3f} in {len(losses)} steps")
    if not last < first:
        raise Failed(f"the loss did not fall: {first:.4f} at first, {last:.4f} at last")


def check_adapters(before: float, after: float, merged: float) -> None:
    """Held-out loss in nats per token: of the base, with its adapters, and of the merged model."""
    print(f"held-out loss    {before:.4f} base, {after:.4f} with adapters, {merged:.4f} merged")
    if not after < before:
        raise Failed(f"the adapters did not help: {after:.4f}, and {before:.4f} without them")
    if not abs(merged - after) < MERGED_MAY_DIFFER:
        raise Failed(f"merging changed the model: {merged:.6f}, and {after:.6f} before")


if __name__ == "__main__":
    leave(exit_code(main, "demo_llama"))
