"""Merge LoRA adapters into a copy of their base, or take them out of one.

python tools/merge.py --base DIR --adapter DIR[:WEIGHT] ... --out DIR [--dtype bf16|fp32|keep]

Adapters that a QLoRA run wrote are merged into the base as that run held it, dequantized from 4
bits; how far that is from the base is printed, tensor by tensor.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama.cli.arguments import exit_code, leave
from tinyllama.convert.merge import (
    AS_TRAINED,
    Merged,
    Packing,
    merge,
    parse_adapter,
    total_lost,
)
from tinyllama.errors import ConfigError, TinyllamaError
from tinyllama.model.counts import aligned


def packing_of(options: argparse.Namespace) -> Packing:
    """What the options say of the base's form."""
    if options.full_base:
        return None
    if not options.quantized_base:
        return AS_TRAINED
    size = 64 if options.block_size is None else options.block_size
    if size < 2 or size % 2:
        raise ConfigError(f"--block-size: got {size}, must be 2 or more and a multiple of 2")
    return int(size)


def precision(done: Merged) -> str:
    """A line for each tensor that was put through 4 bits, and one for all."""
    rows = [
        {
            "w: the base, held: in 4 bits": part.name,
            "max |w - held|": f"{part.largest:.3e}",
            "rms(w - held)": f"{part.rms:.3e}",
            "rms(w - held) / rms(w)": f"{part.relative:.3%}",
        }
        for part in (*done.lost, total_lost(done.lost))
    ]
    return (
        f"the base in 4 bits, groups of {done.block_size} (embedding and head in bfloat16):\n"
        f"{aligned(rows)}"
    )


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", required=True, help="Hugging Face folder of the base model")
    parser.add_argument(
        "--adapter",
        required=True,
        action="append",
        metavar="DIR[:WEIGHT]",
        help="PEFT folder and what it is multiplied by (default: 1); may be given several times",
    )
    parser.add_argument("--out", required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32", "keep"], default="keep", help="type to store"
    )
    parser.add_argument(
        "--unmerge", action="store_true", help="take the adapters out of a merged --base"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--quantized-base",
        action="store_true",
        help="put the base through 4 bits first (default: as the adapters were trained)",
    )
    form.add_argument(
        "--full-base", action="store_true", help="the base as it is, also for QLoRA's adapters"
    )
    parser.add_argument(
        "--block-size", type=int, metavar="N", help="of --quantized-base (default: 64)"
    )
    options = parser.parse_args(arguments)
    if options.block_size is not None and not options.quantized_base:
        parser.error("--block-size: goes with --quantized-base")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with a message on standard error for a mistake in the arguments."""
    options = parsed(arguments)
    try:
        adapters = [parse_adapter(text) for text in options.adapter]
        done = merge(
            options.base,
            adapters,
            options.out,
            dtype=options.dtype,
            unmerge=options.unmerge,
            packing=packing_of(options),
        )
    except TinyllamaError as error:
        print(f"merge: {error}", file=sys.stderr)
        return 2
    if done.block_size is not None:
        print(precision(done))
    print(f"{options.out}: {done.changed} of {done.total} tensors changed, {done.bytes:,} bytes")
    return 0


if __name__ == "__main__":
    leave(exit_code(main, "merge"))
