"""Write a page about one or more runs: curves, anomalies, samples, configuration, machine.

tinyllama report checkpoints/124m --out report.html
tinyllama report checkpoints/first checkpoints/second     compared with each other
tinyllama report checkpoints/124m --watch                 while the run goes on
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama.cli.arguments import path
from tinyllama.errors import ConfigError

if TYPE_CHECKING:
    from tinyllama.reports.runs import Run


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command line."""
    parser.add_argument("runs", metavar="RUN", nargs="+", type=path, help="folders of runs")
    parser.add_argument(
        "--out", type=path, default=Path("report.html"), help="page to write (report.html)"
    )
    parser.add_argument(
        "--watch", action="store_true", help="serve the page on 127.0.0.1 instead, with new steps"
    )
    parser.add_argument(
        "--port", type=int, default=0, help="port of --watch (default: one that is free)"
    )


def run(options: argparse.Namespace) -> None:
    """Write the page and print its name, or serve it until Ctrl-C."""
    from tinyllama.reports.page import page
    from tinyllama.system.files import atomic_write

    if not 0 <= options.port < 1 << 16:
        raise ConfigError(f"--port: got {options.port}, must be from 0 to 65535")
    if options.watch:
        from tinyllama.reports.live import Followed, Live

        followed = Followed(options.runs)  # mistakes are reported at once
        live = Live(options.port, followed.page, followed.data)
        print(f"{live.url} (Ctrl-C ends it)", flush=True)
        live.wait()
        return
    if options.out.is_dir():
        raise ConfigError(f"--out {options.out}: is a folder")
    runs = _read(options.runs)
    atomic_write(options.out, page(runs, words=_words(runs)).encode())
    print(options.out)


def _read(folders: list[Path]) -> "list[Run]":
    from tinyllama.reports.runs import named_apart, read_run

    return named_apart([read_run(folder) for folder in folders])


def _words(runs: "list[Run]") -> list[str]:
    """What stands out in the runs; nothing without scikit-learn."""
    from tinyllama.reports.analyze import available, findings

    if not available():
        return []
    found = [(run, findings(run)) for run in runs]
    return [
        f"{run.name}: {line}" if len(runs) > 1 else line for run, lines in found for line in lines
    ]
