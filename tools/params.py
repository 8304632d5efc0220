"""Count a model's parameters by part, and the bytes they take.

python tools/params.py configs/124m.toml
python tools/params.py checkpoints/124m/final --json
python tools/params.py --published
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama.cli.arguments import exit_code, leave
from tinyllama.config import load_config
from tinyllama.errors import TinyllamaError
from tinyllama.model.counts import (
    WIDTHS,
    Parameters,
    aligned,
    bytes_of,
    folder_parameters,
    published_claims,
)
from tinyllama.system import device


def count(source: str, overrides: Sequence[str]) -> Parameters:
    """The parameters of a configuration's model, or of a folder's. Raises TinyllamaError."""
    if Path(source).is_dir():
        return folder_parameters(source)
    config = load_config(source, overrides)
    device.select()
    from tinyllama.train.memory_estimate import model_parameters
    from tinyllama.train.prepare import with_base

    return model_parameters(with_base(config))


def as_json(found: Parameters) -> dict[str, Any]:
    """The object that --json prints."""
    return {
        "total": found.total,
        "base": found.base,
        "trainable": found.trainable,
        "parts": found.table(),
        "bytes": {str(bits): bytes_of(found.total, bits) for bits in WIDTHS},
    }


def as_text(found: Parameters) -> str:
    """A table by part, with the bytes at each width, and the three sums."""
    rows = [*found.table().items(), ("total", found.total)]
    table = aligned(
        {"part": part.replace("_", "-"), "parameters": f"{n:,}"}
        | {f"{bits} bit, MB": f"{bytes_of(n, bits) / 1e6:,.1f}" for bits in WIDTHS}
        for part, n in rows
    )
    return f"{table}\n\nbase {found.base:,}, trainable {found.trainable:,}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one message on standard error for a mistake in the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", help="TOML configuration, or a checkpoint's folder")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override an option"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--published", action="store_true", help="figures once published, and the true ones"
    )
    options = parser.parse_args(arguments)
    if options.published == bool(options.source):
        parser.error("name a configuration or a folder, or ask for --published")
    try:
        if options.published:
            claims = [claim._asdict() for claim in published_claims()]
            print(json.dumps(claims) if options.json else aligned(claims, left=["why"]))
        else:
            found = count(options.source, options.set)
            print(json.dumps(as_json(found)) if options.json else as_text(found))
    except TinyllamaError as error:
        print(f"params: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    leave(exit_code(main, "params"))
