"""List the devices that answer on this machine, best first, and what the others need."""

import argparse

from tinyllama.system import device


def add_options(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(_: argparse.Namespace) -> None:
    """Print a line per backend."""
    choices = device.available()
    for choice in choices:
        print(f"{choice.device:<8}{choice.description} (renderer {choice.renderer})")
    for name in ("METAL", "CUDA", "AMD", "CL", "CPU"):
        if name not in [choice.device for choice in choices]:
            print(f"{name:<8}not available; needs {device.INSTALL[name]}")
