"""`python -m tinyllama.generate`: continues a prompt."""

import sys

from tinyllama.cli.app import program

if __name__ == "__main__":
    program(["generate", *sys.argv[1:]])
