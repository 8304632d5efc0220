"""Pretrain or fine-tune a model as a TOML configuration says.

tinyllama train 124m --set data.train_path='text/*.txt'
tinyllama train my.toml --resume
"""

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

from tinyllama.cli.arguments import seconds
from tinyllama.cli.shared import add_set, add_threads, select_device, to_stderr
from tinyllama.system import device


class _ShowOptions(argparse.Action):
    """Print every option of the configuration and exit, as --help does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from tinyllama.config import option_help

        print(option_help(), end="")
        parser.exit()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command line."""
    parser.add_argument(
        "config", help="TOML file, or the name of a shipped configuration, such as 124m"
    )
    add_set(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        type=os.path.expanduser,
        metavar="FOLDER",
        help="continue the latest checkpoint, or this folder",
    )
    parser.add_argument(
        "--budget", type=seconds, metavar="SECONDS", help="shorten the schedule to fit this time"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--force", action="store_true", help="train even if memory seems too small")
    add_threads(parser)
    parser.add_argument(
        "--help-options",
        action=_ShowOptions,
        help="list every option of the configuration, which --set overrides, and exit",
    )


def run(options: argparse.Namespace) -> None:
    """Train to the end of the schedule, of the budget, or to a signal."""
    from tinyllama.config import load_config

    config = load_config(options.config, options.set)
    choice = select_device(options.threads)
    from tinyllama.train.micro_batch import fit
    from tinyllama.train.prepare import (
        check_files,
        check_fresh,
        resume_folder,
        supported,
        with_base,
        with_micro_batch_of,
    )
    from tinyllama.train.trainer import Trainer

    supported(config)
    resume = None
    if options.resume is not None:
        resume = resume_folder(config, options.resume, to_stderr)
    if resume is None:
        check_fresh(config)
    else:
        config = with_micro_batch_of(resume, config)
    print(choice.line(), flush=True)
    check_files(config)
    config, step, report = fit(with_base(config, to_stderr), force=options.force)
    print(report, flush=True)
    trainer = Trainer(
        config, resume=resume, budget_seconds=options.budget, show=not options.quiet, planned=step
    )
    if resume is not None:
        print(f"resuming {resume} at step {trainer.step}", flush=True)
    print("\n".join([*trainer.notices(), trainer.summary()]), flush=True)
    outcome = trainer.run()
    if outcome.finished:
        print(f"finished: step {outcome.step}, saved {outcome.checkpoint}")
    else:
        print(
            f"stopped after step {outcome.step}, saved {outcome.checkpoint}; continue with:\n"
            + " ".join([*choice.asked, shlex.join(_resume_command(options, outcome.checkpoint))])
        )


def _resume_command(options: argparse.Namespace, checkpoint: Path) -> list[str]:
    """What a person types to continue the run from `checkpoint`, with the same options."""
    words = ["python", "-m", "tinyllama.train", options.config, "--resume", str(checkpoint)]
    for override in options.set:
        words += ["--set", override]
    numbers = {"threads": device.threads_asked(), "budget": options.budget}
    for name, value in numbers.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return words + [f"--{name}" for name in ("quiet", "force") if getattr(options, name)]
