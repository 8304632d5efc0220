"""Limits of processor time in tests."""

import sys


def within(seconds: float) -> float:
    """A limit that holds also while coverage counts the lines that run."""
    return seconds * (3 if sys.gettrace() else 1)
