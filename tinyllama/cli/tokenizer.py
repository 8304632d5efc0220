"""Train a LLaMA-style SentencePiece tokenizer on your own text.

tinyllama tokenizer data/*.txt --vocab-size 8000 --out tokenizer.model
"""

import argparse
from pathlib import Path

from tinyllama.cli.arguments import count, path
from tinyllama.errors import ConfigError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command line."""
    parser.add_argument(
        "inputs", nargs="+", metavar="TEXT", help=".jsonl or .txt files, folders or patterns"
    )
    parser.add_argument("--vocab-size", type=count, default=32000, help="pieces (default: 32000)")
    parser.add_argument(
        "--out",
        type=path,
        default=Path("tokenizer.model"),
        help="file to write (default: tokenizer.model)",
    )


def run(options: argparse.Namespace) -> None:
    """Write the tokenizer; print its size and digest."""
    from tinyllama.data.files import find_sources, read_texts
    from tinyllama.tokenizers.sentencepiece import train_tokenizer

    if options.out.is_dir():
        raise ConfigError(f"--out {options.out}: is a folder")
    sources = find_sources(options.inputs)
    texts = read_texts(sources, progress=True)
    tokenizer = train_tokenizer(texts, options.vocab_size, options.out)
    text_bytes = sum(source.size_bytes for source in sources)
    print(
        f"{options.out}: {tokenizer.vocab_size} pieces from {len(sources)} files,"
        f" {text_bytes} bytes; sha256 {tokenizer.fingerprint}"
    )
