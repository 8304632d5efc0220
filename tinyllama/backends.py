"""`python -m tinyllama.backends`: the devices that answer on this machine."""

import sys

from tinyllama.cli import main

if __name__ == "__main__":
    main(["backends", *sys.argv[1:]])
