"""What the tests of the text's way to batches share: files, a small tokenizer, processes."""

import functools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tinyllama.data.corpus import TokenDataset, prepare
from tinyllama.tokenizers.sentencepiece import train_tokenizer
from tinyllama.tokenizers.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
LINE = "def add(first, second):  # some code\n"


@functools.cache
def small_tokenizer() -> Tokenizer:
    return train_tokenizer([LINE * 20], 300)


def write(name: str, data: str | bytes | list[str]) -> Path:
    """A file below the current folder; a list is written as rows."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, list):
        data = "".join(json.dumps({"text": text}) + "\n" for text in data)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def load(tokenizer: Tokenizer, *patterns: str, workers: int = 1) -> TokenDataset:
    return prepare(patterns, tokenizer, "cache", workers=workers, progress=False)


def documents(dataset: TokenDataset, tokenizer: Tokenizer) -> list[str]:
    """The texts back from the tokens, having checked where each begins and ends."""
    tokens = dataset.tokens.tolist()
    texts = []
    while tokens:
        end = tokens.index(tokenizer.eos_id)
        assert tokens[0] == tokenizer.bos_id
        texts.append(tokenizer.decode(tokens[1:end]))
        tokens = tokens[end + 1 :]
    return texts


def run_python(code: str, **options: object) -> "subprocess.Popen[str]":
    path = os.pathsep.join([str(ROOT), *sys.path])
    Path("script.py").write_text(textwrap.dedent(code))
    return subprocess.Popen(
        [sys.executable, "script.py"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        **options,  # type: ignore[call-overload]
    )
