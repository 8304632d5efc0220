"""Count a model's parameters by part, and the bytes they take.

The same as `tinyllama params`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama.cli.app import door
from tinyllama.cli.arguments import exit_code, leave

main = door("params", "params")

if __name__ == "__main__":
    leave(exit_code(main, "params"))
