"""`python -m tinyllama.backends`: the devices that answer on this machine."""

import sys

from tinyllama.cli.app import program

if __name__ == "__main__":
    program(["backends", *sys.argv[1:]])
