"""Show rows of data as a model will see them: what is trained, cut off, left out.

tinyllama inspect data/chat.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct
tinyllama inspect data/chat.jsonl --model checkpoints/chat/final --train-on last --json
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama.cli.arguments import count, path
from tinyllama.cli.shared import add_form, form_of, model_folder
from tinyllama.system.notices import to_stderr

if TYPE_CHECKING:
    from tinyllama.data.inspection import InspectedRow, Totals
    from tinyllama.tokenizers.tokenizer import Tokenizer

_SHOWN_ROWS = 20


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command line."""
    parser.add_argument("data", nargs="+", metavar="DATA", help="files, folders or patterns")
    parser.add_argument(
        "--model",
        required=True,
        type=path,
        help="folder of a model, an adapter or a run, a GGUF file, a name on the hub, or the file "
        "of a tokenizer",
    )
    add_form(parser)
    parser.add_argument("--context", type=count, help="tokens per row (default: the model's)")
    parser.add_argument(
        "--rows", type=count, help=f"rows to show (default: {_SHOWN_ROWS}; with --json all)"
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--json", action="store_true", help="one object per row: file, row, ids, trained, truncated"
    )
    shown.add_argument("--html", type=path, metavar="FILE", help="write a page instead")


def run(options: argparse.Namespace) -> None:
    """Print the rows, or write the page."""
    from tinyllama.data.inspection import Totals, inspect

    tokenizer, longest = _opened(options.model)
    context = options.context or longest
    totals = Totals()
    rows = inspect(options.data, tokenizer, form_of(options), context)
    if options.json:
        _print_json(rows, options.rows)
    elif options.html:
        _write_page(rows, tokenizer, totals, options)
    else:
        _print_rows(rows, tokenizer, totals, options.rows or _SHOWN_ROWS)


def _print_json(rows: "Iterable[InspectedRow]", most: int | None) -> None:
    for number, row in enumerate(rows):
        if most is not None and number >= most:
            return
        print(json.dumps(row._asdict()))


def _print_rows(
    rows: "Iterable[InspectedRow]", tokenizer: "Tokenizer", totals: "Totals", most: int
) -> None:
    from tinyllama.data.inspection import runs
    from tinyllama.reports.inspection import terminal_row, terminal_totals

    for row in rows:
        totals.add(row)
        if totals.rows <= most:
            print(terminal_row(row, runs(row, tokenizer), sys.stdout.isatty()))
    print(terminal_totals(totals))


def _write_page(
    rows: "Iterable[InspectedRow]",
    tokenizer: "Tokenizer",
    totals: "Totals",
    options: argparse.Namespace,
) -> None:
    from tinyllama.data.inspection import runs
    from tinyllama.reports.inspection import html_page
    from tinyllama.system.files import atomic_write

    shown = []
    for row in rows:
        totals.add(row)
        if totals.rows <= (options.rows or _SHOWN_ROWS):
            shown.append((row, [*runs(row, tokenizer)]))
    page = html_page(shown, totals, ", ".join(options.data))
    atomic_write(options.html, page.encode())
    to_stderr(f"{options.html}: {len(shown)} of {totals.rows} rows")


def _opened(model: Path) -> "tuple[Tokenizer, int | None]":
    """The tokenizer, and the longest sequence where a model has one."""
    from tinyllama.formats.models import open_model
    from tinyllama.formats.peft import AdapterFolder, is_adapter
    from tinyllama.model.build import tokenizer_folder
    from tinyllama.tokenizers.opening import holds_tokenizer, open_tokenizer
    from tinyllama.train.manifest import verify_tokenizer

    is_file = model.is_file() and model.suffix != ".gguf"
    if is_file or (model.is_dir() and holds_tokenizer(model) and not _has_config(model)):
        verify_tokenizer(model)
        return open_tokenizer(model), None
    folder = model_folder(model)
    verify_tokenizer(tokenizer_folder(folder))
    base = AdapterFolder(folder).base_folder() if is_adapter(folder) else folder
    return open_tokenizer(tokenizer_folder(folder)), open_model(base).config.max_seq_len


def _has_config(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
