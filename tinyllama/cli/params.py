"""Count a model's parameters by part, and the bytes they take.

tinyllama params 124m
tinyllama params checkpoints/124m/final --json
tinyllama params --published
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama.cli.shared import add_set, model_folder
from tinyllama.errors import ConfigError
from tinyllama.system import device

if TYPE_CHECKING:
    from tinyllama.model.counts import Parameters


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command line."""
    parser.add_argument(
        "source",
        nargs="?",
        help="TOML file, the name of a shipped configuration, a checkpoint's folder or a GGUF file",
    )
    parser.add_argument(
        "--published", action="store_true", help="figures once published, and the true ones"
    )
    add_set(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> None:
    """Print the count."""
    from tinyllama.model.counts import aligned, published_claims

    if options.published == bool(options.source):
        raise ConfigError("name a configuration or a folder, or type --published instead")
    if options.published:
        claims = [claim._asdict() for claim in published_claims()]
        print(json.dumps(claims) if options.json else aligned(claims, left=["why"]))
        return
    counts = _count(options.source, options.set)
    print(json.dumps(_as_json(counts)) if options.json else _as_text(counts))


def _count(source: str, overrides: Sequence[str]) -> "Parameters":
    """The parameters of a configuration's model, or of a folder's. Raises TinyllamaError."""
    from tinyllama.config import load_config
    from tinyllama.formats.models import names_a_model
    from tinyllama.model.counts import folder_parameters

    if names_a_model(source):
        if overrides:
            kind = "a folder, whose files are" if Path(source).is_dir() else "a file, which is"
            raise ConfigError(
                f"--set {overrides[0]}: {source} is {kind} counted as they are: leave --set out"
            )
        return folder_parameters(model_folder(Path(source)))
    config = load_config(source, overrides)
    device.select()
    from tinyllama.train.memory_estimate import model_parameters
    from tinyllama.train.prepare import with_base

    return model_parameters(with_base(config))


def _as_json(counts: "Parameters") -> dict[str, Any]:
    """The object that --json prints."""
    from tinyllama.model.counts import WIDTHS, bytes_of

    return {
        "total": counts.total,
        "base": counts.base,
        "trainable": counts.trainable,
        "parts": counts.table(),
        "bytes": {str(bits): bytes_of(counts.total, bits) for bits in WIDTHS},
    }


def _as_text(counts: "Parameters") -> str:
    """A table by part, with the bytes at each width, and the three sums."""
    from tinyllama.model.counts import WIDTHS, aligned, bytes_of

    rows = [*counts.table().items(), ("total", counts.total)]
    table = aligned(
        {"part": part.replace("_", "-"), "parameters": f"{n:,}"}
        | {f"{bits} bit, MB": f"{bytes_of(n, bits) / 1e6:,.1f}" for bits in WIDTHS}
        for part, n in rows
    )
    return f"{table}\n\nbase {counts.base:,}, trainable {counts.trainable:,}"
