"""Merge LoRA adapters into a copy of their base, or take them out of one.

The same as `tinyllama merge`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama.cli.app import door
from tinyllama.cli.arguments import exit_code, leave

main = door("merge", "merge")

if __name__ == "__main__":
    leave(exit_code(main, "merge"))
