"""What tokenizing and packing a large file takes in memory, beside a small one.

python tools/data_memory.py --megabytes 2 20 --rows 100000 10000000 --out docs/data.md

Rows are those of docstrings.py, over and over, each with a number of its own: conversations, pairs
of answers, and text. Each file is read by a process of its own, which then takes a batch of the
first epoch, packed and not. Tokenizing 10 GB takes hours, so --rows measures the second half alone
on so many conversations whose tokens are a hole in a file: 10 million are some 10 GB.

Prints the highest resident memory of that process and of the largest of its workers, and how much
of its own is anonymous, that is, not parts of files that the system may drop.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import demo_corpus
import docstrings
import preferences

from docs import placed
from tinyllama.cli.arguments import exit_code, leave
from tinyllama.data.batches import Batches, prepare
from tinyllama.data.conversations import Form
from tinyllama.data.corpus import TokenDataset
from tinyllama.data.pairs import prepare_pairs
from tinyllama.system.files import atomic_write
from tinyllama.tokenizers.opening import open_tokenizer
from tinyllama.tokenizers.sentencepiece import train_tokenizer
from tinyllama.tokenizers.tokenizer import write_files

CONTEXT = 512
NAME = "memory"


def real_rows() -> list[dict[str, Any]]:
    """The conversations about the standard library's functions."""
    library = Path(sysconfig.get_path("stdlib"))
    found = []
    for name in demo_corpus.find_names(library):
        try:
            source = (library / name).read_text(encoding="utf-8")
            found += [preferences.conversation(row) for row in docstrings.rows(source)]
        except (SyntaxError, UnicodeError):
            continue
    return found


def text_row(row: dict[str, Any], number: int) -> str:
    """A paragraph of text."""
    return f"{number}\n" + "\n".join(message["content"] for message in row["messages"]) + "\n"


def conversation_row(row: dict[str, Any], number: int) -> str:
    """A line of JSON."""
    return json.dumps({"id": number, **row}) + "\n"


def pair_row(row: dict[str, Any], number: int) -> str:
    """The same, with an answer that is rejected."""
    return json.dumps({"id": number, **preferences.pair(row, f"No. {number}")}) + "\n"


# Name of the file -> what makes a row of it.
FILES: dict[str, Callable[[dict[str, Any], int], str]] = {
    "text.txt": text_row,
    "conversations.jsonl": conversation_row,
    "pairs.jsonl": pair_row,
}


def write_file(path: Path, n_bytes: int) -> int:
    """Write the file, and return its rows."""
    make, written, rows = FILES[path.name], 0, itertools.cycle(real_rows())
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            if written >= n_bytes:
                return number
            line = make(row, number)
            file.write(line)
            written += len(line)
    raise AssertionError("rows do not end")


def tokenize_and_pack(path: Path, tokenizer_path: Path) -> None:
    """Tokenize a file and take a batch of each kind."""
    tokenizer, cache = open_tokenizer(tokenizer_path), path.parent / "cache"
    if path.name == "pairs.jsonl":
        pairs = prepare_pairs(str(path), tokenizer, cache, CONTEXT, progress=False)
        Batches(pairs, CONTEXT, 4, seed=1, layout=pairs).next()
    else:
        form = Form("chatml" if path.suffix == ".jsonl" else None)
        take(prepare(str(path), tokenizer, cache, form=form, progress=False, workers=2))


def pack_rows(folder: Path, count: int) -> None:
    """Take a batch of so many conversations, of 20 to 399 tokens."""
    folder.mkdir()
    starts, at = np.memmap(folder / "starts", np.int64, "w+", shape=count), 0
    draw = np.random.default_rng(1)
    for first in range(0, count, 1 << 16):
        lengths = draw.integers(20, 400, min(1 << 16, count - first))
        starts[first : first + len(lengths)] = at + np.cumsum(lengths) - lengths
        at += int(lengths.sum())
    tokens = np.memmap(folder / "tokens", np.uint16, "w+", shape=at)
    trained = np.memmap(folder / "trained", np.uint8, "w+", shape=at)
    take(TokenDataset(folder / "set", tokens, starts, 0, 0, 2, "made", trained))


def take(data: TokenDataset) -> None:
    """A batch of the first epoch, packed and not."""
    for pack in (True, False):
        Batches(data, CONTEXT, 4, seed=1, pack=pack).next()


def in_its_process(task: Callable[[], None]) -> dict[str, float]:
    """What a task takes in this process, in MB and seconds."""
    with highest_anonymous() as anonymous:
        start = time.monotonic()
        task()
        seconds = time.monotonic() - start
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "own": own / 1e3, "workers": workers / 1e3,
            "anonymous": anonymous[0] / 1e3}  # fmt: skip


class highest_anonymous:
    """The highest RssAnon of this process while the block runs, in KB, looked at every 20 ms."""

    def __enter__(self) -> list[int]:
        self._highest, self._done = [0], threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self._highest

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            now = int(status.partition("RssAnon:")[2].split()[0])
            self._highest[0] = max(self._highest[0], now)
            if self._done.wait(0.02):
                return


def measured(options: argparse.Namespace) -> Iterator[str]:
    """Rows of the table."""
    with tempfile.TemporaryDirectory(prefix="tinyllama-data-") as folder:
        tokenizer = Path(folder) / "tokenizer"
        rows = itertools.islice(real_rows(), 2000)
        texts = (text_row(row, number) for number, row in enumerate(rows))
        write_files(train_tokenizer(texts, 4000), tokenizer)
        for name, size in itertools.product(options.files, options.megabytes):
            with tempfile.TemporaryDirectory(dir=folder) as work:
                path = Path(work) / name
                count = write_file(path, size * 1_000_000)
                r = in_another("--read", path, tokenizer)
            yield row_of(f"{name}, {size:,} MB", count, r)
        for count in options.rows:
            with tempfile.TemporaryDirectory(dir=folder) as work:
                r = in_another("--pack", Path(work) / "rows", count)
            yield row_of("packing alone", count, r)


def in_another(*words: object) -> dict[str, float]:
    """What a task takes in a process of its own."""
    command = [sys.executable, __file__, *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return dict(json.loads(done.stdout))


def row_of(what: str, count: int, r: dict[str, float]) -> str:
    """A line of the table."""
    workers = f"{r['workers']:.0f} MB" if r["workers"] else ""
    return (
        f"| {what} | {count:,} | {r['own']:.0f} MB | {r['anonymous']:.0f} MB | {workers} "
        f"| {r['seconds']:.0f} s |"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[2, 20])
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 10_000_000])
    parser.add_argument("--files", nargs="+", choices=FILES, default=[*FILES])
    parser.add_argument("--out", type=Path, help="Markdown page whose table is written")
    parser.add_argument("--read", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--pack", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.read or options.pack:
        task = (
            partial(tokenize_and_pack, *options.read)
            if options.read
            else partial(pack_rows, Path(options.pack[0]), int(options.pack[1]))
        )
        print(json.dumps(in_its_process(task)))
        return 0
    table = [
        "| file | rows | resident | of it anonymous | a worker | time |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for line in measured(options):
        print(line, flush=True)
        table.append(line)
    if options.out:
        page = placed(options.out.read_text(encoding="utf-8"), NAME, "\n".join(table))
        atomic_write(options.out, page.encode())
    return 0


if __name__ == "__main__":
    leave(exit_code(main, "data_memory"))
