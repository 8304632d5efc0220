"""Pretrain or fine-tune a model as a TOML configuration says.

tinyllama train 124m --set data.train_path='text/*.txt'
tinyllama train my.toml --resume
"""

import argparse
import os
from typing import TYPE_CHECKING, Any

from tinyllama.cli.arguments import seconds
from tinyllama.cli.shared import add_set, add_threads, select_device
from tinyllama.system.notices import to_stderr, to_stdout

if TYPE_CHECKING:
    from pathlib import Path

    from tinyllama.config import Config
    from tinyllama.observe.trace import Tracing
    from tinyllama.system.device import DeviceChoice
    from tinyllama.train.trainer import Outcome


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
        help="continue the latest checkpoint of the run, or this folder",
    )
    parser.add_argument(
        "--budget",
        type=seconds,
        metavar="SECONDS",
        help="train for about this long: the schedule is cut to the steps that fit",
    )
    parser.add_argument("--quiet", action="store_true", help="print the result and notices alone")
    parser.add_argument("--force", action="store_true", help="train even if memory seems too small")
    add_threads(parser)
    parser.add_argument(
        "--help-options",
        action=_ShowOptions,
        help="list every option of the configuration, which --set overrides, and exit",
    )


def run(options: argparse.Namespace) -> int:
    """Train to the end of the schedule, of the budget, or to a signal; returns the exit code."""
    from tinyllama.config import load_config

    config, resume = _checked(load_config(options.config, options.set), options.resume)
    choice = select_device(options.threads)
    from tinyllama.observe.trace import tracing

    with tracing(config, to_stderr) as traces:
        outcome = _train(options, config, resume, choice, traces)
    dropped = f"; {traces.dropped} spans dropped" if traces.dropped else ""
    _say(_result(outcome) + dropped)
    return outcome.exit_code


def _checked(config: "Config", wanted: str | None) -> "tuple[Config, Path | None]":
    """The configuration and the checkpoint that `--resume` names: what can be wrong with files is
    found before a device is opened, which takes a while."""
    from tinyllama.train.prepare import (
        check_files,
        check_fresh,
        resume_folder,
        supported,
        with_micro_batch_of,
    )

    supported(config)
    resume = None if wanted is None else resume_folder(config, wanted, to_stderr)
    if resume is None:
        check_fresh(config)
    else:
        config = with_micro_batch_of(resume, config)
    check_files(config)
    return config, resume


def _train(
    options: argparse.Namespace,
    config: "Config",
    resume: "Path | None",
    choice: "DeviceChoice",
    traces: "Tracing",
) -> "Outcome":
    """Build the run and train."""
    from tinyllama.config import defaults_notice
    from tinyllama.train.micro_batch import plan_run
    from tinyllama.train.prepare import with_base
    from tinyllama.train.trainer import Trainer

    say = _say_nothing if options.quiet else _say
    products = config.training.float32_products
    say(choice.line() + ("" if products == "exact" else f", float32 products as {products}"))
    notices = [notice] if (notice := defaults_notice(config)) else []
    say(*notices)  # planning such a run takes a while
    config, step, report = plan_run(with_base(config, to_stderr), force=options.force)
    say(report)
    trainer = Trainer(
        config,
        resume=resume,
        budget_seconds=options.budget,
        show=not options.quiet,
        planned=step,
        tracing=traces,
    )
    if resume is not None:
        say(f"resuming {resume} at step {trainer.step}")
    _say(*(notices if options.quiet else []), *trainer.notices())
    say(trainer.summary())
    if options.budget is not None:
        say(_budget_notice(options.budget, trainer.total_steps))
    return trainer.run()


def _say(*lines: str) -> None:
    for line in lines:
        to_stdout(line)


def _say_nothing(*_: str) -> None:
    """Instead of `_say`, with --quiet."""


def _budget_notice(seconds: float, steps: int) -> str:
    return (
        f"--budget: the schedule of {steps:,} steps is shortened to those that {seconds:g} seconds"
        " allow, as the first steps show; then the run validates, saves, and exits with code 0"
    )


def _result(outcome: "Outcome") -> str:
    """The last line of a run."""
    if not outcome.finished:
        return (
            f"stopped after step {outcome.step}, saved {outcome.checkpoint};"
            " to continue, repeat the command with --resume"
        )
    losses = {"loss": outcome.loss, "validation loss": outcome.val_loss}
    shown = [f"{name} {value:.4f}" for name, value in losses.items() if value is not None]
    early = f" ({outcome.early})" if outcome.early else ""
    saved = f"finished: step {outcome.step}{early}, saved {outcome.checkpoint}"
    return f"{saved}; {', '.join(shown)}" if shown else saved
