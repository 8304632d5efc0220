"""Estimate the memory of a training run, and say whether the device has it.

tinyllama memory 124m --batch 4 --context 512
tinyllama memory 7b --device-memory 8e9 --json
"""

import argparse
import json

from tinyllama.cli.arguments import count
from tinyllama.cli.shared import add_set
from tinyllama.system import device


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command line."""
    parser.add_argument("config", help="TOML file, or the name of a shipped configuration")
    parser.add_argument("--batch", type=count, help="sequences per step, all in memory together")
    parser.add_argument("--context", type=count, help="tokens per sequence")
    parser.add_argument("--dtype", help="of activations: float32, bfloat16 or float16")
    parser.add_argument(
        "--device-memory",
        type=_bytes,
        metavar="BYTES",
        help="memory of the device (default: what is free on this machine)",
    )
    add_set(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> None:
    """Print the estimate. Raises TinyllamaError."""
    from tinyllama.config import load_config

    config = load_config(options.config, _overrides(options))
    choice = device.select()
    from tinyllama.system.memory import free_bytes
    from tinyllama.train.micro_batch import largest_micro_batch, planned_step, verdict
    from tinyllama.train.prepare import with_base

    config = with_base(config)
    limit = free_bytes() if options.device_memory is None else options.device_memory
    _, estimate = planned_step(config, limit)
    if not options.json:
        print(f"{estimate.table()}\n{verdict(config, estimate, limit)}")
        return
    report = {**estimate.as_dict(), "device": choice.device, "device_memory": limit}
    report["fits"] = None if limit is None else estimate.total <= limit
    report["largest_micro_batch"] = None if limit is None else largest_micro_batch(config, limit)
    print(json.dumps(report))


def _overrides(options: argparse.Namespace) -> list[str]:
    """What the options change in the configuration, as `--set` writes it."""
    changes = list(options.set)
    if options.batch is not None:
        changes += [f"training.batch_size={options.batch}", "training.micro_batch_size=none"]
    if options.context is not None:
        changes.append(f"data.context_length={options.context}")
    if options.dtype is not None:
        changes.append(f'training.dtype="{options.dtype}"')
    return changes


def _bytes(word: str) -> int:
    """A number of bytes, also as 8e9."""
    try:
        return int(float(word))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"got {word!r}, must be a number of bytes") from None
