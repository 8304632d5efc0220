"""Estimate the memory of a training run, and say whether the device has it.

The same as `tinyllama memory`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama.cli.app import door
from tinyllama.cli.arguments import exit_code, leave

main = door("memory", "memory")

if __name__ == "__main__":
    leave(exit_code(main, "memory"))
