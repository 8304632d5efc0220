"""Write a model or an adapter for other programs: Hugging Face's, llama.cpp and Ollama, mlx-lm.

The same as `tinyllama export`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama.cli.app import door
from tinyllama.cli.arguments import exit_code, leave

main = door("export", "convert")

if __name__ == "__main__":
    leave(exit_code(main, "convert"))
