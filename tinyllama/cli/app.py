"""The command line: `tinyllama train|generate|evaluate|bench|backends`, one parser each.

A mistake of the user ends as one message on standard error and exit code 2.
"""

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tinyllama.cli.arguments import (
    count,
    exit_code,
    leave,
    path,
    seconds,
)
from tinyllama.errors import ConfigError, DeviceError, TrainingError
from tinyllama.system import device
from tinyllama.system.memory import collect_seldom

if TYPE_CHECKING:
    from tinyllama.model.llama import Llama
    from tinyllama.tokenizers.sentencepiece import Tokenizer


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit; see `command.exit_code`."""
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": train,
        "generate": generate,
        "evaluate": evaluate,
        "bench": bench,
        "backends": backends,
    }
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in commands:
        asked = words[0] if words else ""
        usage = f"usage: tinyllama {{{','.join(commands)}}} ..."
        if asked in ("-h", "--help"):
            print(f"{usage}\n\n{__doc__}")
            sys.exit(0)
        print(f"{usage}\ntinyllama: no command {asked!r}", file=sys.stderr)
        sys.exit(2)
    collect_seldom()
    sys.exit(exit_code(lambda: commands[words[0]](words[1:]), words[0]))


def program(arguments: Sequence[str] | None = None) -> NoReturn:
    """`main`, where the process has nothing else to do."""
    try:
        main(arguments)
    except SystemExit as ended:
        leave(int(ended.code or 0))


def train(words: list[str]) -> None:
    """Pretrain or fine-tune as a TOML file says."""
    asked = _parse(_train_parser(), words)
    from tinyllama.config import load_config

    config = load_config(asked.config, asked.set)
    choice = _select(asked)
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

    warn = _to_stderr
    supported(config)
    resume = None if asked.resume is None else resume_folder(config, asked.resume, warn)
    if resume is None:
        check_fresh(config)
    else:
        config = with_micro_batch_of(resume, config)
    print(choice.line(), flush=True)
    check_files(config)
    config, step, report = fit(with_base(config), force=asked.force)
    print(report, flush=True)
    trainer = Trainer(
        config, resume=resume, budget_seconds=asked.budget, show=not asked.quiet, planned=step
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
            + " ".join([*choice.asked, shlex.join(_resume_command(asked, outcome.checkpoint))])
        )


def _train_parser() -> argparse.ArgumentParser:
    parser = _parser("train", "Train a LLaMA as a TOML configuration says.")
    parser.add_argument("config", help="TOML file, e.g. configs/124m.toml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override an option"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        type=os.path.expanduser,
        help="continue the latest checkpoint, or this folder",
    )
    parser.add_argument(
        "--budget", type=seconds, metavar="SECONDS", help="shorten the schedule to fit this time"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--force", action="store_true", help="train even if memory seems too small")
    return parser


def _resume_command(asked: argparse.Namespace, checkpoint: Path) -> list[str]:
    """What a person types to continue the run from `checkpoint`, with the same options."""
    words = ["python", "-m", "tinyllama.train", asked.config, "--resume", str(checkpoint)]
    for override in asked.set:
        words += ["--set", override]
    numbers = {"threads": device.threads_asked(), "budget": asked.budget}
    for name, value in numbers.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return words + [f"--{name}" for name in ("quiet", "force") if getattr(asked, name)]


def generate(words: list[str]) -> None:
    """Continue a prompt."""
    parser = _parser("generate", "Continue a prompt with a trained model, streaming its tokens.")
    parser.add_argument("--model", required=True, type=path, help="checkpoint folder")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--max-new-tokens", type=count, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    parser.add_argument("--top-k", type=int, help="draw among the k likeliest")
    parser.add_argument("--top-p", type=float, help="draw among those that reach this probability")
    parser.add_argument("--seed", type=int, default=0)
    asked = _parse(parser, words)
    choice = _select(asked)
    from tinyllama.generate.generator import Generator, Sampling

    try:
        sampling = Sampling(asked.temperature, asked.top_k, asked.top_p, asked.seed)
    except ConfigError as error:  # top_k is --top-k here
        raise ConfigError(f"--{str(error).replace('_', '-', 1)}") from None
    tokenizer, model = _load(asked.model)
    _to_stderr(choice.line())
    prompt = [tokenizer.bos_id, *tokenizer.encode(asked.prompt)]
    new_tokens = min(asked.max_new_tokens, model.config.max_seq_len - len(prompt))
    if 1 <= new_tokens < asked.max_new_tokens:
        _to_stderr(f"{new_tokens} new tokens at most: the model's context ends there")
    if new_tokens < 1:
        raise ConfigError(
            f"--prompt: got {len(prompt)} tokens, must be fewer than the {model.config.max_seq_len}"
            " of the model's context"
        )
    generator = Generator(model, len(prompt) + new_tokens, tokenizer.vocab_size)
    decoder = tokenizer.stream()
    print("".join(decoder.push(token) for token in prompt), end="", flush=True)
    for token in generator.tokens(prompt, new_tokens, sampling, stop=[tokenizer.eos_id]):
        print(decoder.push(token), end="", flush=True)
    print(decoder.flush())


def evaluate(words: list[str]) -> None:
    """Print held-out loss as JSON."""
    parser = _parser("evaluate", "Loss, perplexity and bits per byte of a model on text, as JSON.")
    parser.add_argument("--model", required=True, type=path, help="checkpoint folder")
    parser.add_argument("--data", required=True, nargs="+", help="files, folders or patterns")
    parser.add_argument("--context", type=count, help="tokens a window (default: the model's)")
    parser.add_argument("--batch", type=count, default=1, help="windows at once")
    parser.add_argument(
        "--stride",
        type=count,
        help="tokens from window to window (default: the context): with fewer, windows overlap, and"
        " a token has more text before it",
    )
    parser.add_argument(
        "--cache-dir", type=path, default=".cache/tinyllama", help="for tokenized text"
    )
    asked = _parse(parser, words)
    choice = _select(asked)
    from tinyllama.data.batches import prepare
    from tinyllama.train.evaluate import Evaluator

    tokenizer, model = _load(asked.model)
    _to_stderr(choice.line())
    longest = model.config.max_seq_len
    context = asked.context or longest
    if context > longest:
        raise ConfigError(f"--context: got {context}, must be at most the model's {longest}")
    if asked.stride and asked.stride > context:
        raise ConfigError(f"--stride: got {asked.stride}, must be at most the context, {context}")
    dataset = prepare(asked.data, tokenizer, asked.cache_dir)
    result = Evaluator(model, dataset, context, asked.batch, asked.stride).run(progress=True)
    assert result is not None  # nothing asked it to stop
    if not math.isfinite(result.loss):
        raise TrainingError(
            f"{asked.model}: the loss is {result.loss}, so its weights are of no use"
        )
    print(json.dumps(result._asdict()))


def bench(words: list[str]) -> None:
    """Measure training speed; see tinyllama.bench."""
    from tinyllama.bench.__main__ import main as run

    sys.exit(run(words))


def backends(words: list[str]) -> None:
    """Say which devices answer here."""
    _parser("backends", "The devices that answer on this machine, best first.").parse_args(words)
    found = device.available()
    for choice in found:
        print(f"{choice.device:<8}{choice.description} (renderer {choice.renderer})")
    for name in ("METAL", "CUDA", "AMD", "CL", "CPU"):
        if name not in [choice.device for choice in found]:
            print(f"{name:<8}not available; needs {device.INSTALL[name]}")


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"tinyllama {command}", description=description)
    parser.add_argument("--threads", type=int, help="threads of CPU kernels (default: every core)")
    return parser


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    return parser.parse_args(words)


def _select(asked: argparse.Namespace) -> device.DeviceChoice:
    """The device to compute on. Raises DeviceError, also for one that only compiles."""
    choice = device.select(threads=asked.threads)
    if choice.device == "NULL":
        raise DeviceError(
            f"{choice.reason}: NULL compiles kernels and runs none, so it gives no "
            "numbers; for those choose one of `tinyllama backends`"
        )
    return choice


def _load(folder: Path) -> "tuple[Tokenizer, Llama]":
    """The tokenizer and the model of a folder. Raises ConfigError if they do not fit."""
    from tinyllama.model.build import load_model, tokenizer_folder
    from tinyllama.tokenizers.sentencepiece import load_tokenizer

    tokenizer, model = load_tokenizer(tokenizer_folder(folder)), load_model(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} entries, must be at most the "
            f"model's {model.config.vocab_size}"
        )
    return tokenizer, model


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
