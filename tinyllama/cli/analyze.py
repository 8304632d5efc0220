"""Group the steps of a run, and the kernels of its profile; say what the unusual ones share.

tinyllama analyze checkpoints/124m
"""

import argparse

from tinyllama.cli.arguments import path
from tinyllama.errors import ConfigError
from tinyllama.system.notices import to_stdout


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command line."""
    parser.add_argument("folder", metavar="RUN", type=path, help="folder of the run")


def run(options: argparse.Namespace) -> None:
    """Print one line per finding."""
    from tinyllama.reports.runs import read_run

    found = read_run(options.folder)
    from tinyllama.reports.analyze import available, findings

    if not available():
        raise ConfigError(
            "scikit-learn is not installed: pip install 'tinyllama-trainer[observe]' "
            "(or pip install scikit-learn)"
        )
    for line in findings(found):
        to_stdout(line)
