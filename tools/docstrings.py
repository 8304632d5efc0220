"""Write a small real task: docstrings of Python's standard library, to be written from signatures.

python tools/docstrings.py DIR      writes DIR/train.jsonl and DIR/val.jsonl

One row per function and method with a docstring, {"text": ...}: the `def` line, and the first
paragraph of the docstring below it. Functions of one file in 20 are held out, chosen by a hash of
the file's name; a row that is in both parts is only trained on.
"""

import argparse
import ast
import json
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import demo_corpus

from tinyllama.cli.arguments import exit_code, leave
from tinyllama.system.files import atomic_write, make_folder

CHARACTERS = range(20, 401)  # of a docstring: shorter ones say little, longer ones fill a context
Function = ast.FunctionDef | ast.AsyncFunctionDef


def signature(node: Function) -> str:
    """The `def` line of a function, without its decorators."""
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{word} {node.name}({ast.unparse(node.args)}){returns}:\n"


def first_paragraph(node: Function) -> str:
    """The docstring up to its first empty line, as it stands below the `def` line, or ""."""
    text = (ast.get_docstring(node) or "").split("\n\n")[0].strip()
    if len(text) not in CHARACTERS or '"""' in text or "\\" in text:
        return ""
    indented = text.replace("\n", "\n    ")
    return f'    """{indented}"""\n'


def rows(source: str) -> Iterator[dict[str, str]]:
    """The rows of one file's functions, in the order of the file. Raises SyntaxError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own strings
        tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    for node in sorted(functions, key=lambda node: node.lineno):
        if docstring := first_paragraph(node):
            yield {"text": signature(node) + docstring}


def write_rows(library: Path, folder: Path) -> None:
    """Write both files, and print how many rows each has."""
    seen: dict[str, dict[str, None]] = {"train": {}, "val": {}}
    for name in demo_corpus.find_names(library):
        part = "val" if demo_corpus.is_held_out(name) else "train"
        try:
            with tokenize.open(library / name) as file:  # honours a "coding:" comment
                seen[part] |= {json.dumps(row): None for row in rows(file.read())}
        except (SyntaxError, UnicodeError):  # files that show what is refused
            continue
    parts = {
        "train": list(seen["train"]),
        "val": [r for r in seen["val"] if r not in seen["train"]],
    }
    make_folder(folder)
    for part, lines in parts.items():
        atomic_write(folder / f"{part}.jsonl", "".join(f"{line}\n" for line in lines).encode())
        print(f"{folder / part}.jsonl: {len(lines)} docstrings")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 where the folder cannot be written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where train.jsonl and val.jsonl go")
    options = parser.parse_args(arguments)
    try:
        write_rows(Path(sysconfig.get_path("stdlib")), options.folder)
    except OSError as error:
        print(f"docstrings: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    leave(exit_code(main, "docstrings"))
