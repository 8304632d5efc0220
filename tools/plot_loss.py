"""Draw a run's loss curve.

The same as `tinyllama plot`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama.cli.app import door
from tinyllama.cli.arguments import exit_code, leave

main = door("plot", "plot_loss")

if __name__ == "__main__":
    leave(exit_code(main, "plot_loss"))
