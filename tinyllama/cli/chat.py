"""Talk to a model in the terminal.

tinyllama chat checkpoints/chat/final
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama.cli.arguments import naming_text, path
from tinyllama.cli.sampling import add_sampling, sampling_of
from tinyllama.cli.shared import add_threads, load, model_folder, select_device
from tinyllama.cli.talking import add_model_word, context_length, template_of
from tinyllama.errors import ConfigError, TinyllamaError, missing, reason
from tinyllama.system.notices import text_to_stdout, to_stderr
from tinyllama.system.signals import Terminated, ignoring_interrupts, stopping_on_interrupt

if TYPE_CHECKING:
    from tinyllama.generate.conversation import Conversation
    from tinyllama.generate.sampling import Sampling

HELP = """\
/reset          forget the conversation, but not the system prompt
/system TEXT    set the system prompt and forget the conversation; without TEXT, show it
/save FILE      write the conversation as a line of JSON Lines, which training reads
/help           this list
/exit           leave, like Ctrl-D
Ctrl-C stops an answer. A message that begins with / is sent if a space stands before it."""
COMMANDS = ("/reset", "/system", "/save", "/help", "/exit")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command line."""
    add_model_word(parser)
    parser.add_argument("--adapter", type=path, metavar="FOLDER", help="an adapter of MODEL to use")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt (default: none)")
    parser.add_argument(
        "--history",
        type=path,
        metavar="FILE",
        help="keep typed lines in this file (default: until the end of the chat)",
    )
    add_sampling(parser, 1024)
    add_threads(parser)


def run(options: argparse.Namespace) -> None:
    """Answer each line, until /exit or the end of standard input."""
    sampling = sampling_of(options)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        _check_prompt_toolkit()
    choice = select_device(options.threads)
    from tinyllama.generate.conversation import Conversation
    from tinyllama.generate.generator import Generator

    if options.adapter is None:
        tokenizer, model = load(options.model, options.base)
    elif options.base is not None:
        raise ConfigError("--base: must be left out with --adapter, whose base MODEL is")
    else:
        tokenizer, model = load(options.adapter, model_folder(options.model))
    to_stderr(choice.line())
    template = template_of(tokenizer, options.template)
    length = context_length(options.context, model.config.max_seq_len)
    generator = Generator(model, length)
    conversation = Conversation(generator, tokenizer, template, options.system)
    chat = _Chat(conversation, sampling, options, is_terminal)
    if is_terminal:
        generator.compile()  # so that the first answer comes as quickly as the others
        with ignoring_interrupts():  # so that a Ctrl-C behind the end of an answer loses nothing
            chat.run(_typed(options.history))
    else:
        chat.run(_piped())


class _Chat:
    """Reads lines, runs commands, prints answers as they are made."""

    def __init__(
        self,
        conversation: "Conversation",
        sampling: "Sampling",
        options: argparse.Namespace,
        is_terminal: bool,
    ) -> None:
        self._conversation, self._sampling = conversation, sampling
        self._options, self._is_terminal = options, is_terminal
        self._answers = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": lambda _: self._reset(),
            "/system": self._system,
            "/save": self._save,
            "/help": lambda _: print(HELP, flush=True),
        }

    def run(self, lines: Iterator[str]) -> None:
        """Raises TinyllamaError for a line that cannot be answered, unless somebody sits there."""
        if self._is_terminal:
            print("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the chat")
        for line in lines:
            word, _, rest = line.partition(" ")
            if word == "/exit":
                return
            try:
                if word.startswith("/"):
                    self._command(word, rest.strip())
                elif line.strip():
                    self._answer(line.strip())
            except (TinyllamaError, OSError) as error:
                if not self._is_terminal:
                    raise
                to_stderr(reason(error) if isinstance(error, OSError) else str(error))

    def _command(self, word: str, rest: str) -> None:
        if word not in self._commands:
            from tinyllama.config.options import nearest

            raise ConfigError(f"no command {word}, the nearest is {nearest(word, COMMANDS)}")
        self._commands[word](rest)

    def _reset(self) -> None:
        self._conversation.reset()
        to_stderr("the conversation is forgotten")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = text
            self._reset()
        else:
            print(self._conversation.system or "there is no system prompt", flush=True)

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError("/save: name a file, such as /save chat.jsonl")
        file = path(name)
        if file.exists():
            raise ConfigError(f"{file}: exists already; name another file")
        self._conversation.save(file)
        to_stderr(f"saved {file}")

    def _answer(self, text: str) -> None:
        options, conversation = self._options, self._conversation
        sampling = replace(self._sampling, seed=self._sampling.seed + self._answers)
        self._answers += 1
        answer = conversation.answer(text, options.max_new_tokens, sampling, options.stop)
        if conversation.left_out:
            to_stderr(f"the oldest {conversation.left_out} messages do not fit the context")
        with stopping_on_interrupt() as is_stopped:
            for piece in answer:
                text_to_stdout(piece)
                if is_stopped():
                    break
        print(flush=True)
        if answer.completion.finish_reason == "length" and self._is_terminal:
            to_stderr("the answer was cut at its limit (--max-new-tokens, --context)")


def _check_prompt_toolkit() -> None:
    """Raise ConfigError, before a model is loaded, where lines cannot be typed."""
    try:
        import prompt_toolkit  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{missing(error)} is not installed: pip install prompt_toolkit, or give messages on "
            "standard input"
        ) from None


def _piped() -> Iterator[str]:
    with naming_text("standard input"):
        for line in sys.stdin:
            yield line.rstrip("\r\n")


def _typed(history: Path | None) -> Iterator[str]:
    """Lines typed at a terminal, with what was typed before at the arrow keys."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    kept: History = InMemoryHistory() if history is None else FileHistory(str(history))
    session: PromptSession[str] = PromptSession(history=kept)
    while True:
        try:
            yield session.prompt("> ", handle_sigint=False)
        except Terminated:
            raise
        except KeyboardInterrupt:
            print("/exit or Ctrl-D ends the chat")
        except EOFError:
            return
