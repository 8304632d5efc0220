"""Continue a prompt with a trained model, printing each token when it is made.

tinyllama generate --model checkpoints/124m/final --prompt "Once upon a time"

`--prompt -` reads standard input. `--prompts FILE` continues many prompts, several at once, and
writes one JSON object per prompt: prompt, text, finish_reason.
"""

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tinyllama.cli.arguments import count, naming_text, path
from tinyllama.cli.sampling import add_sampling, sampling_of
from tinyllama.cli.shared import add_model, add_threads, load, model_folder, select_device
from tinyllama.cli.talking import template_of
from tinyllama.errors import ConfigError, DataError, naming
from tinyllama.system.notices import text_to_stdout, to_stderr

if TYPE_CHECKING:
    from tinyllama.generate.completion import Completion
    from tinyllama.model.llama import Llama
    from tinyllama.tokenizers.templates import ChatTemplate
    from tinyllama.tokenizers.tokenizer import Tokenizer


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command line."""
    add_model(parser)
    parser.add_argument(
        "--prompt", help="text to continue, - for that of standard input (default: none)"
    )
    parser.add_argument(
        "--prompts",
        type=path,
        metavar="FILE",
        help='a prompt per line; in a .jsonl file, {"prompt": ...} or {"messages": ...} per line',
    )
    parser.add_argument(
        "--out", type=path, metavar="FILE", help="where --prompts writes (default: standard output)"
    )
    parser.add_argument(
        "--parallel",
        type=count,
        default=4,
        help="prompts of a file that are computed together (default: 4)",
    )
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a message, and its answer is printed"
    )
    parser.add_argument(
        "--template",
        metavar="NAME",
        help="with --chat: chatml, llama2, llama3, alpaca or none (default: the model's own)",
    )
    add_sampling(parser, 128)
    add_threads(parser)


def run(options: argparse.Namespace) -> None:
    """Print the prompt and its continuation, or write those of a file."""
    _check(options)
    folder = model_folder(options.model)
    sampling_of(options)
    choice = select_device(options.threads)
    tokenizer, model = load(folder, options.base)
    to_stderr(choice.line())
    work = _Work(options, tokenizer, model)
    if options.out is not None:
        with options.out.open("w", encoding="utf-8") as output:
            work.write_all(options.prompts, output)
    elif options.prompts is not None:
        work.write_all(options.prompts, sys.stdout)
    else:
        with naming_text("--prompt -"):
            text = sys.stdin.read() if options.prompt == "-" else options.prompt or ""
        work.print_one(text)


def _check(options: argparse.Namespace) -> None:
    """Raise ConfigError for options that do not go together."""
    if options.prompt is not None and options.prompts is not None:
        raise ConfigError("--prompt: must be left out with --prompts")
    if options.out is not None and options.prompts is None:
        raise ConfigError("--out: must be left out without --prompts")
    if options.chat and options.prompts is None and not options.prompt:
        raise ConfigError("--chat: needs a message, --prompt TEXT or --prompt -")
    if options.template is not None and not options.chat and options.prompts is None:
        raise ConfigError("--template: must be left out without --chat")


class _Work:
    """One model and how it continues prompts."""

    def __init__(self, options: argparse.Namespace, tokenizer: "Tokenizer", model: "Llama") -> None:
        self._options, self._tokenizer, self._model = options, tokenizer, model
        self._sampling = sampling_of(options)
        self._longest = model.config.max_seq_len

    @cached_property
    def _template(self) -> "ChatTemplate":
        return template_of(self._tokenizer, self._options.template)

    def print_one(self, text: str) -> None:
        """Print the continuation of one prompt, token by token."""
        from tinyllama.generate.generator import Generator

        with naming("--prompt", ConfigError):
            completion = self._completion(text)
        if completion.limit < self._options.max_new_tokens:
            to_stderr(f"{completion.limit} new tokens at most: the model's context ends there")
        if not self._options.chat:
            text_to_stdout(text)
        length = completion.prompt_tokens + completion.limit
        for piece in completion.run(Generator(self._model, length)):
            text_to_stdout(piece)
        print()

    def write_all(self, file: Path, output: TextIO) -> None:
        """Write the continuations of the prompts of a file, in their order, as soon as they and
        all before them are complete."""
        from tinyllama.generate.batch import Batch

        batch = Batch(self._model, self._longest, self._options.parallel)
        rows = [row for _, row in _rows(file)]
        completions = [*self._checked(file)]
        texts = {id(completion): "" for completion in completions}
        waiting, unwritten = deque(completions), deque(zip(completions, rows, strict=True))
        while unwritten:
            if waiting and batch.has_room:
                batch.begin(waiting.popleft())
            for completion, made in batch.advance():
                texts[id(completion)] += made.text
            while unwritten and unwritten[0][0].finish_reason is not None:
                completion, row = unwritten.popleft()
                result = {"text": texts[id(completion)], "finish_reason": completion.finish_reason}
                output.write(json.dumps(row | result, ensure_ascii=False) + "\n")
                output.flush()

    def _checked(self, file: Path) -> "Iterator[Completion]":
        """What continues each row of a file. Raises ConfigError and DataError with its line."""
        for number, row in _rows(file):
            with naming(f"{file}, line {number}"):
                yield self._completion(row["messages"] if "messages" in row else row["prompt"])

    def _completion(self, prompt: str | list[Any]) -> "Completion":
        """What continues a text, or answers messages. Raises ConfigError, and DataError where the
        template refuses them."""
        from tinyllama.generate.completion import Completion
        from tinyllama.generate.conversation import checked_messages

        is_chat = self._options.chat or not isinstance(prompt, str)
        if is_chat:
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            ids = self._template.encode_prompt(checked_messages(prompt))
        else:
            assert isinstance(prompt, str)
            ids = [*self._tokenizer.begin, *self._tokenizer.encode(prompt, special=True)]
        room = self._longest - len(ids)
        if room < 1:
            raise ConfigError(
                f"got {len(ids)} tokens, must be fewer than the {self._longest}"
                " of the model's context"
            )
        new_tokens = min(self._options.max_new_tokens, room)
        stop = self._options.stop
        return Completion(
            self._tokenizer, ids, new_tokens, self._sampling, stop, continued=not is_chat
        )


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The prompts of a file with the numbers of their lines; empty lines are left out.

    Raises DataError and OSError.
    """
    with file.open(encoding="utf-8-sig", newline="\n") as lines, naming_text(file):
        for number, line in enumerate(lines, 1):
            line = line.rstrip("\r\n")
            if line:
                yield number, _row(file, number, line)


def _row(file: Path, number: int, line: str) -> dict[str, Any]:
    if file.suffix != ".jsonl":
        return {"prompt": line}
    where = f"{file}, line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        return row
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise DataError(f'{where}: must be {{"prompt": TEXT}} or {{"messages": [...]}}')
    return row
