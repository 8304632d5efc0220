"""What a training run shows on standard error: one line that is rewritten, or a few that stay.

on a terminal   ██████▌       step 120/2000  loss 5.1234  val 5.3021  1234 tok/s  2:31 left
                311 MiB  MFU 41 %
elsewhere       a line after steps 1, 2, 5, 10, 20, 50, ..., after each validation, after the
                last step, and at least once a minute
"""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

from tqdm import tqdm

from tinyllama.errors import fit_for_terminal

SECONDS_BETWEEN_LINES = 60.0
_SECONDS_BETWEEN_DRAWINGS = 0.1
_BAR = 16  # columns of the bar
_COLUMNS = 80  # of a terminal that does not say


class Progress:
    """The progress of a run that begins after step `done`; `shown=False` shows nothing.

    A reader that goes away does not disturb the run.
    """

    def __init__(self, done: int, shown: bool = True) -> None:
        self._done, self._shown = done, shown
        self._is_terminal = shown and sys.stderr.isatty()
        self._written = time.monotonic()
        self._since = (done, self._written)  # a step, and when it ended: the speed is that since
        self._val_loss: float | None = None
        self._line = ""  # of a terminal: what the line shows once it is drawn again

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal's line complete, and the cursor below it."""
        if self._line:
            self._draw(end="\n")

    def before_first_step(self, val_loss: float) -> None:
        """Show the validation loss of the weights that the run begins with."""
        self._val_loss = val_loss
        if self._shown and not self._is_terminal:
            self._write(f"step {self._done}, validation loss {val_loss:.4f}\n")

    def notice(self, text: str) -> None:
        """Print a line that stays, above the terminal's line."""
        if self._is_terminal and self._line:
            self._write("\r\x1b[K")
        self._write(f"{fit_for_terminal(text)}\n")

    def compiling(self, done: int, total: int) -> None:
        """Show that `done` of `total` kernels for a GPU are compiled."""
        if not self._shown:
            return
        if self._is_terminal:
            self._line = f"compiling kernels for the GPU  {done}/{total}"[: _columns() - 1]
            if done in (1, total) or self._is_time_to_draw():
                self._draw()
        elif done == 1:
            self._write(f"compiling {total} kernels for the GPU\n")

    def after_step(
        self,
        step: int,
        total: int,
        loss: float,
        tokens_per_second: float,
        val_loss: float | None = None,
        *,
        memory_bytes: int | None = None,
        flops_share: float | None = None,
    ) -> None:
        """Show step `step` of `total`; losses are in nats per token. `flops_share` is the share of
        the device's measured speed (model FLOPs utilization, Chowdhery et al. 2022)."""
        if not self._shown:
            return
        self._val_loss = self._val_loss if val_loss is None else val_loss
        now = time.monotonic()
        speed = f"{tokens_per_second:.0f} tok/s"
        more = _more(memory_bytes, flops_share)
        left = (total - step) * self._step_seconds(step, now)
        if self._is_terminal:
            parts = [f"step {step}/{total}", f"loss {loss:.4f}", speed, f"{_clock(left)} left"]
            if self._val_loss is not None:
                parts.insert(2, f"val {self._val_loss:.4f}")
            self._line = _with_bar([*parts, *more], step / total, _columns() - 1)
            if self._is_time_to_draw():
                self._draw()
        elif (
            val_loss is not None
            or step in (self._done + 1, total)
            or _is_round(step)
            or now - self._written >= SECONDS_BETWEEN_LINES
        ):
            parts = [f"step {step}/{total}", f"loss {loss:.4f}", speed, f"{_clock(left)} left"]
            if val_loss is not None:
                parts.insert(2, f"validation loss {val_loss:.4f}")
            self._write(", ".join([*parts, *more]) + "\n")

    def _step_seconds(self, step: int, now: float) -> float:
        """How long a step takes, from the start of the run, or the end of its first step: that one
        waits for compilers, and says nothing of those to come."""
        first, began = self._since
        if step == self._done + 1:
            self._since = step, now
        return (now - began) / max(1, step - first)

    def _is_time_to_draw(self) -> bool:
        return time.monotonic() - self._written >= _SECONDS_BETWEEN_DRAWINGS

    def _draw(self, end: str = "") -> None:
        self._write(f"\r\x1b[K{self._line}{end}")

    def _write(self, text: str) -> None:
        self._written = time.monotonic()
        with suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()


def fitting(parts: Sequence[str], columns: int) -> str:
    """As many of the first parts as fit the columns; the last ones are left out, and then the
    words of the first, so that the loss stays in sight."""
    for count in range(len(parts), 1, -1):
        text = "  ".join(parts[:count])
        if len(text) <= columns:
            return text
    short = [part.rpartition(" ")[2] for part in parts[:2]]
    return next((t for t in (" ".join(short), short[-1]) if len(t) <= columns), "")


def _more(memory_bytes: int | None, flops_share: float | None) -> list[str]:
    """Memory and utilization, where they are known."""
    memory = [] if memory_bytes is None else [f"{memory_bytes / 2**20:,.0f} MiB"]
    return memory + ([] if flops_share is None else [f"MFU {100 * flops_share:.0f} %"])


def _with_bar(parts: Sequence[str], share: float, columns: int) -> str:
    """The parts behind a bar, where the terminal shows its characters and has room for it."""
    text = fitting(parts, columns)
    encoding = (getattr(sys.stderr, "encoding", None) or "").lower().replace("-", "")
    if encoding != "utf8" or len(text) + _BAR + 2 > columns:
        return text
    bar = tqdm.format_meter(share, 1, 0, ncols=_BAR, bar_format="{bar}")
    return f"{bar}  {text}"


def _is_round(step: int) -> bool:
    """1, 2, 5, 10, 20, 50, ..."""
    digits = str(step)
    return digits[0] in "125" and not digits[1:].strip("0")


def _clock(seconds: float) -> str:
    """2:31, or 1:02:31."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _COLUMNS
    except (OSError, ValueError):  # a stream that is no file
        return _COLUMNS
