"""Train a LLaMA-style SentencePiece tokenizer on your own text.

The same as `tinyllama tokenizer`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama.cli.app import door
from tinyllama.cli.arguments import exit_code, leave

main = door("tokenizer", "train_tokenizer")

if __name__ == "__main__":
    leave(exit_code(main, "train_tokenizer"))
