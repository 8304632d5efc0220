"""A thousand lines of many scripts: prose and code of the standard library, words in the letters of
sixty scripts, emoji, odd spaces. The same at every call."""

import functools
import importlib.util
import random
import sys
import unicodedata
from pathlib import Path
from pydoc_data import topics

MODULES = ("ast", "argparse", "datetime", "decimal", "json.encoder", "shutil", "tarfile", "turtle")
ODD = (
    "", " ", "  ", " leading", "trailing ", "two  spaces   three", "\ttab\tand  spaces\t",
    "\r", "\x00\x01\x7f", "\ufeffmark", "no\u00a0break", "thin\u2009space", "\u3000wide",
    "zero\u200bwidth\u200djoiner", "e\u0301 and \u00e9", "\u0301alone",
    "fi\ufb01 \u2126 \u212b \u2460",
    "👩‍👩‍👧 🇨🇭 👍🏽 ☃️ 🏴\U000e0067\U000e0062\U000e007f", 
    "\U0001f600" * 9, "\U00013000\U000e01ef\ufffd",
    "<s> and </s> <unk> <0x0A> [INST] <<SYS>>", "<|im_start|>user<|im_end|> <|endoftext|>",
    "x" * 300, "ab" * 200, "1234567890" * 9, "!" * 70, "-" * 80, "=" * 33 + ">",
    "don't I'll we're IT'S you'Ve 's 'x", "3.14 1,000,000 0x1F 1e-8 2^10", "a.b.c/d\\e?f=g&h#i",
    "def f(x):  return  x", "    indented", "        more", "snake_case camelCase SHOUT_CASE",
)  # fmt: skip
ENDS, BETWEEN = ".!?。", (" ", " ", "، ", "。", "-")


@functools.cache
def scripts() -> dict[str, str]:
    """Letters and marks of each script, by the first word of their Unicode names."""
    found: dict[str, list[str]] = {}
    for number in range(0x20, sys.maxunicode + 1):
        character = chr(number)
        if unicodedata.category(character)[0] in "LM":
            found.setdefault(unicodedata.name(character, "?").split()[0], []).append(character)
    largest = sorted(found, key=lambda name: -len(found[name]))[:60]
    return {name: "".join(found[name]) for name in largest}


@functools.cache
def lines() -> tuple[str, ...]:
    """More than a thousand lines, none with a line end."""
    drawn = random.Random(7)
    made = [*ODD]
    for letters in scripts().values():
        for _ in range(8):
            words = ("".join(drawn.choices(letters, k=drawn.randint(1, 9))) for _ in range(9))
            made.append(
                drawn.choice((" ", " ", "، ", "。", "-")).join(words) + drawn.choice(".!?。")
            )
    prose = "\n".join(topics.topics[name] for name in sorted(topics.topics)).split("\n")
    code = [line for name in MODULES for line in source(name).split("\n")]
    made += drawn.sample([line for line in prose if line], 350)
    made += drawn.sample([line for line in code if line], 350)
    return tuple(made)


def source(module: str) -> str:
    """The source text of a module of the standard library."""
    spec = importlib.util.find_spec(module)  # not imported: some need what is not installed
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


@functools.cache
def long_text() -> str:
    """Over a hundred thousand characters with line ends, indents and blank lines."""
    drawn = random.Random(3)
    every = [*lines()]
    drawn.shuffle(every)
    whole = "\n".join(every) + "\n\n" + source("argparse") + "\r\n".join(every[:99])
    return whole.replace("\u2581", "")
