"""`python -m tinyllama.evaluate`: held-out loss of a model, as JSON."""

import sys

from tinyllama.cli.app import program

if __name__ == "__main__":
    program(["evaluate", *sys.argv[1:]])
