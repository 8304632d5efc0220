"""Write a small real corpus: the source of Python's own standard library, without its tests.

python tools/demo_corpus.py DIR      writes DIR/train.jsonl and DIR/val.jsonl

One row per file, {"text": ..., "path": ...}. One file in 20 is held out, chosen by a hash of its
name, so that every machine with the same Python holds out the same files.
"""

import argparse
import hashlib
import json
import os
import sys
import sysconfig
import tokenize
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama.cli.arguments import exit_code, leave
from tinyllama.system.files import atomic_write

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
HELD_OUT_ONE_IN = 20


def is_held_out(name: str) -> bool:
    """Whether the file with that name (relative to the library, with /) is for validation."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def find_names(library: Path) -> list[str]:
    """Names of the .py files below `library`, sorted, without the folders LEFT_OUT."""
    names = []
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = set(subfolders) - LEFT_OUT  # not entered
        names += [Path(folder, file).relative_to(library) for file in files]
    return sorted(name.as_posix() for name in names if name.suffix == ".py")


def write_corpus(library: Path, folder: Path) -> None:
    """Write both files and print what they hold and what was left out."""
    rows: dict[str, list[str]] = {"train": [], "val": []}
    text_bytes = {"train": 0, "val": 0}
    n_empty = n_undecodable = 0
    for name in find_names(library):
        try:
            with tokenize.open(library / name) as file:  # honours a "coding:" comment
                text = file.read()
            text_bytes_here = len(text.encode())
        except (SyntaxError, UnicodeError) as error:
            print(f"left out, cannot be decoded: {name}: {error}")
            n_undecodable += 1
            continue
        if not text:
            n_empty += 1
            continue
        part = "val" if is_held_out(name) else "train"
        rows[part].append(json.dumps({"text": text, "path": name}, ensure_ascii=False) + "\n")
        text_bytes[part] += text_bytes_here
    folder.mkdir(parents=True, exist_ok=True)
    for part, lines in rows.items():
        atomic_write(folder / f"{part}.jsonl", "".join(lines).encode())
        print(f"{folder / part}.jsonl: {len(lines)} files, {text_bytes[part]} bytes of text")
    print(f"left out: {n_empty} empty files, {n_undecodable} that cannot be decoded")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where train.jsonl and val.jsonl go")
    options = parser.parse_args(arguments)
    try:
        write_corpus(Path(sysconfig.get_path("stdlib")), options.folder)
    except OSError as error:
        print(f"demo_corpus: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    leave(exit_code(main, "demo_corpus"))
