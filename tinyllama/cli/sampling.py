"""The options of generate, chat and serve: how tokens are drawn and where a text ends."""

import argparse
from typing import TYPE_CHECKING

from tinyllama.cli.arguments import count
from tinyllama.errors import ConfigError

if TYPE_CHECKING:
    from tinyllama.generate.sampling import Sampling


def add_sampling(parser: argparse.ArgumentParser, new_tokens: int | None) -> None:
    """--temperature and those beside it; new_tokens is the default of --max-new-tokens."""
    parser.add_argument(
        "--max-new-tokens",
        type=count,
        default=new_tokens,
        help=f"most tokens to make (default: {new_tokens or 'what the context has room for'})",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="above 1 more varied, below 1 less; 0 takes the likeliest token (default: 0.8)",
    )
    parser.add_argument("--top-k", type=int, help="draw among the k likeliest (default: all)")
    parser.add_argument(
        "--top-p",
        type=float,
        help="draw among the likeliest tokens that reach this probability together (default: all)",
    )
    parser.add_argument(
        "--min-p",
        type=float,
        help="draw among tokens of at least this share of the likeliest one's probability"
        " (default: all)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="above 1 makes tokens that the text holds less likely (default: 1)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given several times",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")


def sampling_of(options: argparse.Namespace, seed: int | None = None) -> "Sampling":
    """How tokens are drawn, with another seed than the option's if one is given.

    Raises ConfigError, naming the option.
    """
    from tinyllama.generate.completion import StopStrings
    from tinyllama.generate.sampling import Sampling

    try:
        StopStrings(options.stop)
        return Sampling(
            options.temperature,
            options.top_k,
            options.top_p,
            options.seed if seed is None else seed,
            options.min_p,
            options.repetition_penalty,
        )
    except ConfigError as error:  # top_k is --top-k here
        name, _, rest = str(error).partition(":")
        raise ConfigError(f"--{name.replace('_', '-')}:{rest}") from None
