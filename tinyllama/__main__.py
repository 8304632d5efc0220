"""`python -m tinyllama COMMAND ...`, the same as the console script `tinyllama`."""

from tinyllama.cli.app import program

if __name__ == "__main__":
    program()
