"""Measure training speed, alone or beside PyTorch.

tinyllama bench 124m --batch 1 --context 512 --peer torch
"""

import argparse

from tinyllama.bench.options import add_options

__all__ = ["add_options", "run"]


def run(options: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    from tinyllama.bench.benchmark import run as measure

    return measure(options)
