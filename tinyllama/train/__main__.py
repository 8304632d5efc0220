"""`python -m tinyllama.train`: trains as a TOML file says."""

import sys

from tinyllama.cli.app import program

if __name__ == "__main__":
    program(["train", *sys.argv[1:]])
