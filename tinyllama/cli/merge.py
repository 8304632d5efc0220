"""Merge LoRA adapters into a copy of their base, or take them out of one.

tinyllama merge --base DIR --adapter DIR[:WEIGHT] ... --out DIR [--dtype bf16|fp16|fp32|keep]

Adapters that a QLoRA run wrote are merged into the base as that run held it, dequantized from 4
bits; how far that is from the base is printed, tensor by tensor.
"""

import argparse
from typing import TYPE_CHECKING

from tinyllama.cli.shared import model_folder
from tinyllama.errors import ConfigError

if TYPE_CHECKING:
    from tinyllama.convert.merge import Merged, Packing


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command line."""
    parser.add_argument(
        "--base", required=True, help="Hugging Face folder or GGUF file of the base model"
    )
    parser.add_argument(
        "--adapter",
        required=True,
        action="append",
        metavar="DIR[:WEIGHT]",
        help="folder of an adapter or of its run, and what it is multiplied by (default: 1); may be"
        " given several times",
    )
    parser.add_argument("--out", required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--dtype",
        choices=["bf16", "fp16", "fp32", "keep"],
        default="keep",
        help="type to store weights in (default: keep the base's)",
    )
    parser.add_argument(
        "--unmerge", action="store_true", help="take the adapters out of a merged --base"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--quantized-base",
        action="store_true",
        help="round the base to 4 bits first (default: as the adapters were trained)",
    )
    form.add_argument(
        "--full-base", action="store_true", help="the base as it is, also for QLoRA's adapters"
    )
    parser.add_argument(
        "--block-size",
        type=int,
        metavar="N",
        help="weights per scale, with --quantized-base (default: 64)",
    )


def run(options: argparse.Namespace) -> None:
    """Write the merged folder; print what changed."""
    packing = _packing(options)
    from tinyllama.convert.merge import merge, parse_adapter

    adapters = [
        (model_folder(folder), weight) for folder, weight in map(parse_adapter, options.adapter)
    ]
    done = merge(
        options.base,
        adapters,
        options.out,
        dtype=options.dtype,
        unmerge=options.unmerge,
        packing=packing,
    )
    if done.block_size is not None:
        print(_precision(done))
    print(f"{options.out}: {done.changed} of {done.total} tensors changed, {done.bytes:,} bytes")


def _packing(options: argparse.Namespace) -> "Packing":
    """The base's form that the options ask for. Raises ConfigError."""
    from tinyllama.convert.merge import AS_TRAINED

    if options.block_size is not None and not options.quantized_base:
        raise ConfigError("--block-size: goes with --quantized-base")
    if options.full_base:
        return None
    if not options.quantized_base:
        return AS_TRAINED
    size = 64 if options.block_size is None else options.block_size
    if size < 2 or size % 2:
        raise ConfigError(f"--block-size: got {size}, must be 2 or more and a multiple of 2")
    return int(size)


def _precision(done: "Merged") -> str:
    """A line per tensor that was rounded, to 4 bits or to bfloat16, and one for all."""
    from tinyllama.convert.merge import total_lost
    from tinyllama.model.counts import aligned

    rows = [
        {
            "w: the base, held: in training": part.name,
            "max |w - held|": f"{part.largest:.3e}",
            "rms(w - held)": f"{part.rms:.3e}",
            "rms(w - held) / rms(w)": f"{part.relative:.3%}",
        }
        for part in (*done.lost, total_lost(done.lost))
    ]
    return f"{_held(done)} (embedding and head in bfloat16):\n{aligned(rows)}"


def _held(done: "Merged") -> str:
    """How the adapters' run held the base."""
    packed = f"in 4 bits, groups of {done.block_size}"
    if not done.as_stored:
        return f"the base {packed}"
    kept = f"the base's layers as its file holds them: {done.as_stored}"
    return f"{kept}; {done.packed} {packed}" if done.packed else kept
