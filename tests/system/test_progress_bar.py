"""A bar in a terminal is one line that is drawn again; in a file it is a few lines."""

import os
import pty
import sys
import termios
import threading

import pytest

from tinyllama.system.progress_bar import progress_bar


def work(shown: bool = True) -> None:
    with progress_bar(1000, "Reading", "window", shown=shown) as bar:
        for _ in range(1000):
            bar.update()


def test_a_file_gets_a_line_at_the_start_and_one_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    work()
    text = capsys.readouterr().err
    assert "\r" not in text and text.endswith("\n")
    first, last = text.splitlines()
    assert first.startswith("Reading:   0%") and "0/1000" in first
    assert last.startswith("Reading: 100%") and "1000/1000" in last


def test_a_terminal_gets_one_line_that_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    found: list[bytes] = []

    def read() -> None:
        while (part := os.read(ours, 4096)) and b"done" not in part:
            found.append(part)
        found.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        work()
        terminal.write("done")
        terminal.flush()
        reader.join(10)
    os.close(ours)
    text = b"".join(found).decode()
    assert text.count("\n") == 1 and text.startswith("\rReading:   0%")
    assert "1000/1000" in text


def test_a_bar_that_is_not_shown_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    work(shown=False)
    assert capsys.readouterr().err == ""
