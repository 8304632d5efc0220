"""What packing the base costs: held-out loss of LoRA and of QLoRA after the same steps.

python tools/compare_qlora.py --base .demo/run/final --out docs/qlora-quality.md

Trains the same adapters twice with `python -m tinyllama.train`, on the base itself and on the base
packed into 4 bits, with the same data in the same order and the same initial adapters. Exits with
code 1 if QLoRA's loss is more than 2 % higher.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama.cli.arguments import exit_code, leave
from tinyllama.errors import TinyllamaError
from tinyllama.formats.huggingface import open_folder
from tinyllama.formats.int4 import largest_block
from tinyllama.system.files import atomic_write

ALLOWED = 0.02


def held_out_loss(options: argparse.Namespace, folder: Path, extra: Sequence[str]) -> float:
    """Held-out loss in nats per token after training in `folder` with `extra` settings."""
    settings = [
        f"model.base={options.base}",
        f"training.max_steps={options.steps}",
        f"training.eval_every={options.steps}",
        f"lora.rank={options.rank}",
        f"lora.alpha={2 * options.rank}",
        f"checkpointing.checkpoint_dir={folder}",
        *options.set,
        *extra,
    ]
    command = [sys.executable, "-m", "tinyllama.train", options.config, "--quiet"]
    command += [word for setting in settings for word in ("--set", setting)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    if "val_loss" not in last:
        raise TinyllamaError(f"{options.config}: data.val_path: not set, nothing is held out")
    return float(last["val_loss"])


def report(options: argparse.Namespace, plain: float, packed: float) -> str:
    """The result as Markdown."""
    return (
        "# QLoRA against LoRA\n\nPrinted by tools/compare_qlora.py: adapters of rank"
        f" {options.rank} on `{options.base}`, {options.steps} steps,\n"
        f"4-bit groups of {options.block_size}.\n\n"
        "| base | held-out loss, nats per token |\n|---|---|\n"
        f"| not packed | {plain:.4f} |\n| 4 bits | {packed:.4f} |\n\n"
        f"Packing the base costs {packed / plain - 1:+.2%} (allowed: {ALLOWED:+.0%}).\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 if QLoRA is worse than allowed, 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="configs/demo.toml", help="data and schedule")
    parser.add_argument("--base", type=Path, required=True, help="checkpoint to start from")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--block-size", type=int, help="default: the largest up to 64 that divides every layer"
    )
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    try:
        if options.block_size is None:
            options.block_size = largest_block(open_folder(options.base).config, 64)
        qlora = ["qlora.quantize_base=true", f"qlora.block_size={options.block_size}"]
        with tempfile.TemporaryDirectory() as work:
            plain = held_out_loss(options, Path(work) / "lora", [])
            packed = held_out_loss(options, Path(work) / "qlora", qlora)
    except (TinyllamaError, OSError, subprocess.CalledProcessError) as error:
        print(f"compare_qlora: {error}", file=sys.stderr)
        return 2
    text = report(options, plain, packed)
    print(text)
    if options.out:
        atomic_write(options.out, text.encode())
    return 0 if packed <= plain * (1 + ALLOWED) else 1


if __name__ == "__main__":
    leave(exit_code(main, "compare_qlora"))
