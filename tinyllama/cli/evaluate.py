"""Print a model's loss, perplexity and bits per byte on text, as one JSON object.

tinyllama evaluate --model checkpoints/124m/final --data data/val.txt
"""

import argparse
import json
import math

from tinyllama.cli.arguments import count, path
from tinyllama.cli.shared import (
    add_form,
    add_model,
    add_threads,
    form_of,
    load,
    model_folder,
    select_device,
)
from tinyllama.errors import ConfigError, TrainingError
from tinyllama.system.notices import to_stderr


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command line."""
    add_model(parser)
    parser.add_argument(
        "--data", required=True, nargs="+", help="text or conversations: files, folders or patterns"
    )
    add_form(parser)
    parser.add_argument("--context", type=count, help="tokens per window (default: the model's)")
    parser.add_argument(
        "--batch", type=count, default=1, help="windows computed together (default: 1)"
    )
    parser.add_argument(
        "--stride",
        type=count,
        help="tokens from window to window (default: the context): with fewer, windows overlap, and"
        " a token has more text before it",
    )
    parser.add_argument(
        "--cache-dir",
        type=path,
        default=".cache/tinyllama",
        help="folder for tokenized text (default: .cache/tinyllama)",
    )
    add_threads(parser)


def run(options: argparse.Namespace) -> None:
    """Print the object."""
    folder = model_folder(options.model)
    choice = select_device(options.threads)
    from tinyllama.data.batches import layout_of, prepare
    from tinyllama.train.evaluate import Evaluator

    tokenizer, model = load(folder, options.base)
    to_stderr(choice.line())
    longest = model.config.max_seq_len
    context = options.context or longest
    if context > longest:
        raise ConfigError(f"--context: got {context}, must be at most the model's {longest}")
    if options.stride and options.stride > context:
        raise ConfigError(f"--stride: got {options.stride}, must be at most the context, {context}")
    dataset = prepare(options.data, tokenizer, options.cache_dir, form=form_of(options))
    for notice in layout_of(dataset, context, stride=options.stride).notices():
        to_stderr(notice)
    result = Evaluator(model, dataset, context, options.batch, options.stride).run(progress=True)
    assert result is not None  # it was given nothing to stop it
    if not math.isfinite(result.loss):
        raise TrainingError(
            f"{options.model}: the loss is {result.loss}, so its weights are of no use"
        )
    print(json.dumps(result._asdict()))
