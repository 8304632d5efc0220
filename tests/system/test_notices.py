"""What is printed for people holds nothing that a terminal acts on."""

import io
import sys

import pytest

from tinyllama.errors import MOST_CHARACTERS, DataError
from tinyllama.system.notices import text_to_stdout, to_stderr, to_stdout

HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m\u202ename\rend"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("say", [to_stderr, to_stdout])
def test_a_line_is_printable(say, capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE)
    out, err = capsys.readouterr()
    (line,) = (out + err).splitlines()
    assert line == r"\x1b[2J\x1b]0;title\x07\x9b31m\u202ename\rend"


def test_a_models_text_keeps_its_letters_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    family = "naïve\t漢字 \U0001f469\u200d\U0001f467\n"  # joined by U+200D
    monkeypatch.setattr(sys, "stdout", Terminal())
    text_to_stdout(family + HOSTILE)
    assert sys.stdout.getvalue() == (family + r"\x1b[2J\x1b]0;title\x07\x9b31m\u202ename\rend")


def test_a_models_text_goes_into_a_file_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text_to_stdout(HOSTILE)
    assert capsys.readouterr().out == HOSTILE


def test_a_message_has_no_long_line() -> None:
    begin, end = "file.json: key: got ", ": type git lfs pull"
    line = str(DataError(f"{begin}{'x' * 10**6}{end}"))
    assert len(line) == MOST_CHARACTERS
    assert line.startswith(begin) and line.endswith(end) and " ... " in line
    whole = "x" * MOST_CHARACTERS
    assert str(DataError(whole)) == whole
