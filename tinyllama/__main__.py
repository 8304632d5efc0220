"""`python -m tinyllama COMMAND ...`, the same as the console script `tinyllama`."""

from tinyllama.cli import main

if __name__ == "__main__":
    main()
