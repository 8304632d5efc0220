"""List the devices that answer on this machine, best first, and what the others need.

tinyllama backends --report docs
"""

import argparse
from pathlib import Path

from tinyllama.cli.arguments import path
from tinyllama.errors import ConfigError
from tinyllama.system import device
from tinyllama.system.notices import to_stderr


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command line."""
    parser.add_argument(
        "--report",
        type=path,
        metavar="FOLDER",
        help="write BACKENDS.md and backends.json into it: what a training step is on every"
        " backend, here or not (10 minutes on 2 cores)",
    )


def run(options: argparse.Namespace) -> None:
    """Print a line per backend, or write the report."""
    if options.report is not None:
        _report(options.report)
        return
    choices = device.available()
    for choice in choices:
        print(f"{choice.device:<8}{choice.description} (renderer {choice.renderer})")
    for name in ("METAL", "CUDA", "AMD", "CL", "CPU"):
        if name not in [choice.device for choice in choices]:
            print(f"{name:<8}not available; needs {device.INSTALL[name]}")


def _report(folder: Path) -> None:
    from tinyllama.reports.backends import write

    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--report {folder}: is a file, must be a folder")
    write(folder, to_stderr)
    print(folder / "BACKENDS.md")
