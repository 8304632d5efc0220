"""Lines for people, of a bounded length, without the characters that a terminal acts on.

Names, values and messages may come from somebody else's files and hold escape sequences, which
move the cursor, rename the window, or hide what was said before.
"""

import sys

from tinyllama.errors import fit_for_terminal, shortened


def to_stderr(line: str) -> None:
    """Print a line that is no result."""
    print(fit_for_terminal(shortened(line)), file=sys.stderr, flush=True)


def to_stdout(line: str) -> None:
    """Print a line that is a result."""
    print(fit_for_terminal(shortened(line)), flush=True)


def text_to_stdout(text: str) -> None:
    """Print a piece of a text that a model wrote: to a terminal without control characters besides
    tabs and line ends, into a file or a pipe as it is."""
    print(_without_controls(text) if sys.stdout.isatty() else text, end="", flush=True)


def _without_controls(text: str) -> str:
    """Control characters spelled out; unlike `fit_for_terminal`, what joins emoji stays."""
    return "".join(c if c in "\n\t" or not _acts(c) else repr(c)[1:-1] for c in text)


def _acts(character: str) -> bool:
    return character < " " or "\x7f" <= character < "\xa0" or character in _DIRECTIONS


# Embeddings and overrides of the direction of writing: what follows is shown backwards.
_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
