"""How much memory training with a configuration needs, and whether the device has it.

python tools/memory.py configs/124m.toml --batch 4 --context 512
python tools/memory.py configs/7b.toml --device-memory 8e9 --json
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama.cli.arguments import count, exit_code, leave
from tinyllama.config import load_config
from tinyllama.errors import TinyllamaError
from tinyllama.system import device


def overrides(options: argparse.Namespace) -> list[str]:
    """What the options change in the configuration, as `--set` writes it."""
    changes = list(options.set)
    if options.batch is not None:
        changes += [f"training.batch_size={options.batch}", "training.micro_batch_size=none"]
    if options.context is not None:
        changes.append(f"data.context_length={options.context}")
    if options.dtype is not None:
        changes.append(f'training.dtype="{options.dtype}"')
    return changes


def report(options: argparse.Namespace) -> str:
    """What is printed. Raises TinyllamaError."""
    config = load_config(options.config, overrides(options))
    choice = device.select()
    from tinyllama.system.memory import free_bytes
    from tinyllama.train.memory_estimate import estimate_memory
    from tinyllama.train.micro_batch import largest_micro_batch, verdict
    from tinyllama.train.prepare import with_base

    config = with_base(config)
    limit = free_bytes() if options.device_memory is None else options.device_memory
    estimate = estimate_memory(config)
    if not options.json:
        return f"{estimate.table()}\n{verdict(config, estimate, limit)}"
    found = {**estimate.as_dict(), "device": choice.device, "device_memory": limit}
    found["fits"] = None if limit is None else estimate.total <= limit
    found["largest_micro_batch"] = None if limit is None else largest_micro_batch(config, limit)
    return json.dumps(found)


def _bytes(word: str) -> int:
    """A number of bytes, also as 8e9."""
    try:
        return int(float(word))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"got {word!r}, must be a number of bytes") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one message on standard error for a mistake in the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="TOML configuration, e.g. configs/124m.toml")
    parser.add_argument("--batch", type=count, help="sequences a step, all in memory at once")
    parser.add_argument("--context", type=count, help="tokens a sequence")
    parser.add_argument("--dtype", help="of activations: float32, bfloat16 or float16")
    parser.add_argument(
        "--device-memory",
        type=_bytes,
        metavar="BYTES",
        help="default: what is free on this machine",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override an option"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    try:
        print(report(parser.parse_args(arguments)))
    except TinyllamaError as error:
        print(f"memory: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    leave(exit_code(main, "memory"))
