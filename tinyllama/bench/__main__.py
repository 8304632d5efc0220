"""`python -m tinyllama.bench`: times training steps, ours and PyTorch's in turn."""

import sys

from tinyllama.cli.app import program

if __name__ == "__main__":
    program(["bench", *sys.argv[1:]])
