"""What a run shows while it goes on: lines in a file, one line on any terminal."""

import io
import math

import pytest

from tinyllama.observe import progress
from tinyllama.observe.progress import Progress, fitting


class Terminal(io.StringIO):
    """A terminal; `shown` is what its line holds after each drawing."""

    def isatty(self) -> bool:
        return True

    def drawings(self) -> list[str]:
        return self.getvalue().split("\r\x1b[K")[1:]


class Clock:
    """time.monotonic, moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress.time, "monotonic", made)
    return made


def steps_shown(text: str) -> list[int]:
    return [int(line.split()[1].split("/")[0].rstrip(",")) for line in text.splitlines()]


def test_a_file_gets_a_line_after_round_steps_validations_and_the_last(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with Progress(0) as shown:
        for step in range(1, 124):
            shown.after_step(step, 123, 5.0, 10.0, 6.0 if step == 33 else None)
    assert steps_shown(capsys.readouterr().err) == [1, 2, 5, 10, 20, 33, 50, 100, 123]


def test_a_file_gets_a_line_a_minute_at_least(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with Progress(1000) as shown:
        for step in range(1001, 1010):
            clock.now += 25
            shown.after_step(step, 5000, 5.0, 10.0)
    assert steps_shown(capsys.readouterr().err) == [1001, 1004, 1007]


def test_a_line_says_loss_validation_speed_and_the_time_left(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with Progress(10) as shown:
        clock.now += 30
        shown.after_step(20, 2020, 5.12345, 1234.4, 6.5)
        clock.now += 30
        shown.after_step(30, 31, 5.0, 10.0)
        shown.after_step(100, 101, math.pi, 10.0)
    assert capsys.readouterr().err.splitlines() == [
        "step 20/2020, loss 5.1235, validation loss 6.5000, 1234 tok/s, 1:40:00 left",
        "step 100/101, loss 3.1416, 10 tok/s, 0:01 left",
    ]


def test_the_time_left_forgets_how_long_the_first_step_waited_for_compilers(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with Progress(0) as shown:
        clock.now += 60
        shown.after_step(1, 101, 5.0, 10.0)
        clock.now += 2
        shown.after_step(2, 101, 5.0, 10.0)
    first, second = capsys.readouterr().err.splitlines()
    assert "1:40:00 left" in first and "3:18 left" in second  # 99 steps of 2 s


def test_a_validation_before_the_first_step_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(0) as shown:
        shown.before_first_step(9.87654)
    assert capsys.readouterr().err == "step 0, validation loss 9.8765\n"


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(0, shown=False) as shown:
        shown.before_first_step(9.0)
        shown.after_step(1, 1, 5.0, 10.0, 5.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (120, "step 120/2000  loss 5.1234  val 5.3021  1234 tok/s  0:16 left"),
        (60, "step 120/2000  loss 5.1234  val 5.3021  1234 tok/s"),
        (40, "step 120/2000  loss 5.1234  val 5.3021"),
        (30, "step 120/2000  loss 5.1234"),
        (20, "120/2000 5.1234"),
        (10, "5.1234"),
        (4, ""),
    ],
)
def test_a_terminal_of_any_width_keeps_the_loss_on_one_line(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, columns: int, line: str
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "_columns", lambda: columns)
    with Progress(118) as shown:
        shown.before_first_step(5.3021)
        clock.now += 0.017
        shown.after_step(120, 2000, 5.1234, 1234.0)
    assert terminal.drawings() == ([f"{line}\n"] if line else [])
    assert len(line) < columns


def test_a_terminals_line_is_rewritten_ten_times_a_second_at_most(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress(0) as shown:
        for step in range(1, 101):
            clock.now += 0.01
            shown.after_step(step, 100, 5.0, 10.0, 6.0 if step == 50 else None)
    drawn = terminal.drawings()
    assert 8 <= len(drawn) <= 12
    assert drawn[-1].startswith("step 100/100  loss 5.0000  val 6.0000") and drawn[-1][-1] == "\n"
    assert not any("\n" in text for text in drawn[:-1])


def test_a_reader_that_goes_away_does_not_disturb(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Broken())
    with Progress(0) as shown:
        shown.after_step(1, 1, 5.0, 10.0)


def test_the_width_is_that_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pty = pytest.importorskip("pty")
    import fcntl
    import os
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 47, 0, 0))
    with os.fdopen(leader), os.fdopen(follower, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        assert progress._columns() == 47


def test_the_first_two_parts_lose_their_words_last() -> None:
    assert fitting(["step 1/2", "loss 3.0"], 18) == "step 1/2  loss 3.0"
    assert fitting(["step 1/2", "loss 3.0"], 17) == "1/2 3.0"


def test_the_wait_for_compilers_is_one_line_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(0) as shown:
        for done in range(1, 41):
            shown.compiling(done, 40)
    with Progress(0, shown=False) as shown:
        shown.compiling(1, 40)
    assert capsys.readouterr().err == "compiling 40 kernels for the GPU\n"


def test_the_wait_for_compilers_is_counted_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    with Progress(0) as shown:
        for done in range(1, 5):
            shown.compiling(done, 4)
            clock.now += 0.06
    lines = terminal.drawings()
    assert [line.split()[-1] for line in lines] == ["1/4", "3/4", "4/4", "4/4"]
    assert lines[0] == "compiling kernels for the GPU  1/4"


def test_memory_and_utilization_are_shown_where_they_are_known(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with Progress(0) as shown:
        shown.after_step(1, 10, 5.0, 10.0, memory_bytes=300 << 20, flops_share=0.413)
    said = capsys.readouterr().err
    assert said == "step 1/10, loss 5.0000, 10 tok/s, 0:00 left, 300 MiB, MFU 41 %\n"


def test_a_terminal_that_shows_its_characters_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    class Utf8(Terminal):
        encoding = "utf-8"

    terminal = Utf8()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "_columns", lambda: 100)
    with Progress(0) as shown:
        clock.now += 1
        shown.after_step(50, 100, 5.0, 10.0)
        shown.notice("something unusual")
        shown.after_step(100, 100, 5.0, 10.0)
    first, *_, last = terminal.drawings()
    assert first.startswith("████████          step 50/100  loss 5.0000")
    assert "something unusual\n" in terminal.getvalue()
    assert last.startswith("█" * 16 + "  step 100/100") and len(last) <= 100
