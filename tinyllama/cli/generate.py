"""Continue a prompt with a trained model, printing each token when it is made.

tinyllama generate --model checkpoints/124m/final --prompt "Once upon a time"
"""

import argparse

from tinyllama.cli.arguments import count
from tinyllama.cli.shared import add_model, add_threads, load, select_device, to_stderr
from tinyllama.errors import ConfigError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command line."""
    add_model(parser)
    parser.add_argument("--prompt", default="", help="text to continue (default: none)")
    parser.add_argument(
        "--max-new-tokens", type=count, default=128, help="most tokens to make (default: 128)"
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
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    add_threads(parser)


def run(options: argparse.Namespace) -> None:
    """Print the prompt and its continuation."""
    choice = select_device(options.threads)
    from tinyllama.generate.generator import Generator, Sampling

    try:
        sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    except ConfigError as error:  # top_k is --top-k here
        raise ConfigError(f"--{str(error).replace('_', '-', 1)}") from None
    tokenizer, model = load(options.model, options.base)
    to_stderr(choice.line())
    prompt = [*tokenizer.begin, *tokenizer.encode(options.prompt, special=True)]
    new_tokens = min(options.max_new_tokens, model.config.max_seq_len - len(prompt))
    if 1 <= new_tokens < options.max_new_tokens:
        to_stderr(f"{new_tokens} new tokens at most: the model's context ends there")
    if new_tokens < 1:
        raise ConfigError(
            f"--prompt: got {len(prompt)} tokens, must be fewer than the {model.config.max_seq_len}"
            " of the model's context"
        )
    generator = Generator(model, len(prompt) + new_tokens, tokenizer.vocab_size)
    decoder = tokenizer.stream()
    print(options.prompt, end="", flush=True)
    for token in prompt:
        decoder.push(token)
    for token in generator.tokens(prompt, new_tokens, sampling, stop=tokenizer.eos_ids):
        print(decoder.push(token), end="", flush=True)
    print(decoder.flush())
