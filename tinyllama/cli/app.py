"""The command line: finds the command, parses its options, runs it.

A command is a file of this package with a docstring (its description in --help), `add_options` and
`run`. Heavy imports belong inside `run`, so that --help and mistakes are quick.
"""

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NoReturn

from tinyllama.cli import (
    analyze,
    backends,
    bench,
    chat,
    evaluate,
    export,
    generate,
    inspect,
    memory,
    merge,
    params,
    plot,
    profile,
    report,
    serve,
    tokenizer,
    train,
)
from tinyllama.cli.arguments import Parser, exit_code, leave
from tinyllama.errors import TinyllamaError
from tinyllama.system.memory import collect_seldom, return_freed_arrays
from tinyllama.version import __version__

COMMANDS: dict[str, ModuleType] = {
    command.__name__.rpartition(".")[2]: command
    for command in (
        train,
        generate,
        chat,
        serve,
        evaluate,
        inspect,
        merge,
        export,
        params,
        memory,
        tokenizer,
        plot,
        report,
        analyze,
        profile,
        bench,
        backends,
    )
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit; see `arguments.exit_code` for the exit codes."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    collect_seldom()
    return_freed_arrays()
    sys.exit(exit_code(lambda: _run(words), words[0] if words else "tinyllama"))


def program(arguments: Sequence[str] | None = None) -> NoReturn:
    """`main`, where the process has nothing else to do."""
    try:
        main(arguments)
    except SystemExit as ended:
        leave(int(ended.code or 0))


def door(command: str, name: str) -> Callable[[Sequence[str] | None], int]:
    """The main function of tools/NAME.py: one command, whose mistakes begin with the tool's name.

    It returns the exit code. argparse raises SystemExit as usual.
    """

    def run(arguments: Sequence[str] | None = None) -> int:
        module = COMMANDS[command]
        parser = Parser(prog=f"{name}.py", description=module.__doc__)
        module.add_options(parser)
        try:
            return module.run(parser.parse_args(arguments)) or 0
        except TinyllamaError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2

    return run


def _run(words: list[str]) -> int | None:
    root = Parser(prog="tinyllama", description="Pretrain and fine-tune LLaMA models on tinygrad.")
    root.add_argument("--version", action="version", version=f"tinyllama {__version__}")
    listed = root.add_subparsers(metavar="COMMAND", title="commands", required=True)
    for name, module in COMMANDS.items():
        text = module.__doc__ or ""
        parser = listed.add_parser(
            name, prog=f"tinyllama {name}", description=text, help=_first(text)
        )
        if words[:1] == [name] or not COMMANDS.keys() & words[:1]:  # the others' take 5 ms
            module.add_options(parser)
        parser.set_defaults(run=module.run)
    if not words or (words[0] not in COMMANDS and not words[0].startswith("-")):
        root.error(_no_command(words[0] if words else None))
    if words[0] in COMMANDS:
        listed.choices[words[0]].check_names(words[1:])
    options = root.parse_args(words)
    code: int | None = options.run(options)
    return code


def _first(text: str) -> str:
    """The first sentence of a description, as the list of commands shows it."""
    return text.partition("\n")[0].removesuffix(".")


def _no_command(word: str | None) -> str:
    from tinyllama.config.options import listed, nearest

    if word is None:
        return f"name a command: {listed(COMMANDS)}"
    return f"no command {word!r}, the nearest is {nearest(word, COMMANDS)}"
