"""A bar on standard error for work that may take minutes; in a file or a pipe, a few lines."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 60.0


class _Lines:
    """Standard error that is no terminal: each state of a bar on a line of its own."""

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(
    total: int, what: str, unit: str, *, scaled: bool = False, shown: bool = True
) -> "tqdm[None]":
    """A bar over `total` units, not begun; `scaled` counts them in thousands and millions.

    A terminal's line is drawn again and again. Elsewhere there is a line at the start, one a
    minute, and one at the end.
    """
    from tqdm import tqdm  # here: importing it costs time, and a training step needs no bar

    words = {"total": total, "desc": what, "unit": unit, "unit_scale": scaled}
    if sys.stderr.isatty():
        return tqdm(**words, disable=not shown)
    often = {"mininterval": _SECONDS_BETWEEN_LINES, "maxinterval": _SECONDS_BETWEEN_LINES}
    return tqdm(**words, disable=not shown, file=_Lines(), **often)
