"""Train a LLaMA-style SentencePiece tokenizer on your own text.

python tools/train_tokenizer.py data/*.txt --vocab-size 8000 --out tokenizer.model
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama.cli.arguments import count, exit_code, leave
from tinyllama.data.files import find_sources, read_texts
from tinyllama.errors import ConfigError, TinyllamaError
from tinyllama.tokenizers.sentencepiece import train_tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on standard error for a mistake in the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("inputs", nargs="+", help=".jsonl or .txt files, folders or globs")
    parser.add_argument("--vocab-size", type=count, default=32000, help="pieces (default: 32000)")
    parser.add_argument("--out", type=Path, default=Path("tokenizer.model"), help="file to write")
    options = parser.parse_args(arguments)
    try:
        if options.out.is_dir():
            raise ConfigError(f"--out {options.out}: is a folder")
        sources = find_sources(options.inputs)
        texts = read_texts(sources, progress=True)
        tokenizer = train_tokenizer(texts, options.vocab_size, options.out)
    except (TinyllamaError, OSError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 2
    text_bytes = sum(source.size_bytes for source in sources)
    print(
        f"{options.out}: {tokenizer.vocab_size} pieces from {len(sources)} files,"
        f" {text_bytes} bytes; sha256 {tokenizer.fingerprint}"
    )
    return 0


if __name__ == "__main__":
    leave(exit_code(main, "train_tokenizer"))
