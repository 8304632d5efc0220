"""Merge LoRA adapters into a copy of their base, or take them out of one.

python tools/merge.py --base DIR --adapter DIR[:WEIGHT] ... --out DIR [--dtype bf16|fp32|keep]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama.errors import TinyllamaError
from tinyllama.merge import merge, parse_adapter


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with a message on standard error for a mistake in the arguments."""
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
    options = parser.parse_args(arguments)
    try:
        adapters = [parse_adapter(text) for text in options.adapter]
        done = merge(
            options.base, adapters, options.out, dtype=options.dtype, unmerge=options.unmerge
        )
    except TinyllamaError as error:
        print(f"merge: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {done.changed} of {done.total} tensors changed, {done.bytes:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
