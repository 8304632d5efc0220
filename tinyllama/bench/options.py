"""The options of the benchmark's command line."""

import argparse

PEERS = ("torch", "torch-compile", "lora")
DTYPES = ("float32", "bfloat16", "float16")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command line."""
    add = parser.add_argument
    add(
        "config",
        nargs="?",
        default="124m",
        help="TOML file, or the name of a shipped configuration (default: 124m)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override an option of the configuration; may be given several times",
    )
    add("--batch", type=_positive, help="rows per step (default: fills 512 tokens)")
    add("--context", type=_positive, help="tokens per row (default: at most 512)")
    add("--dtype", choices=DTYPES, help="of activations (default: training.dtype)")
    add("--steps", type=_positive, default=5, help="timed steps, after 2 to warm up (default: 5)")
    add("--threads", type=_positive, help="threads of CPU kernels (default: every core)")
    add("--peer", choices=PEERS, help="compare with PyTorch, or QLoRA with our LoRA")
    add("--peer-python", metavar="PATH", help="interpreter that has PyTorch (default: this one)")
    add("--peer-dtype", choices=DTYPES, help="of the peer's activations (default: as ours)")
    add("--ops", action="store_true", help="time each operation alone, in GFLOPS")
    add("--json", action="store_true", help="print one JSON object")


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"got {word!r}, must be 1 or more")
    return int(word)
