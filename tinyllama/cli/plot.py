"""Draw a run's loss curve: training loss smoothed, validation loss.

tinyllama plot checkpoints/124m --out loss.png
"""

import argparse
import math
from pathlib import Path

from tinyllama.cli.arguments import path
from tinyllama.errors import CheckpointError, ConfigError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command line."""
    parser.add_argument("folder", metavar="RUN", type=path, help="folder of the run")
    parser.add_argument(
        "--out", type=path, default=Path("loss.png"), help="PNG to write (default: loss.png)"
    )


def run(options: argparse.Namespace) -> None:
    """Write the picture; print its name."""
    from tinyllama.observe.metrics import read_metrics
    from tinyllama.reports.plot import draw

    if not options.folder.is_dir():
        raise CheckpointError(f"{options.folder}: no such folder")
    if options.out.is_dir():
        raise ConfigError(f"--out {options.out}: is a folder")
    file = options.folder / "metrics.jsonl"
    rows = read_metrics(file)
    if not any(math.isfinite(row.get("loss", math.nan)) for row in rows):
        raise CheckpointError(f"{file}: holds no step")
    try:
        draw(rows, options.out, str(options.folder), None)
    except ImportError:
        raise ConfigError("matplotlib is not installed: pip install matplotlib") from None
    print(options.out)
