"""Time training steps of a configuration, ours and PyTorch's in turn."""

import argparse
import dataclasses
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama.bench import machine, report, text
from tinyllama.bench.options import add_options
from tinyllama.bench.protocol import Spec
from tinyllama.bench.runner import (
    WARM_UP_STEPS,
    Answer,
    contenders,
    race,
    speed_ratio,
    summarise,
)
from tinyllama.config import Config, LlamaConfig, load_config
from tinyllama.errors import ConfigError, TinyllamaError
from tinyllama.model.counts import model_flops
from tinyllama.system import device

# Tokens per step if neither an option nor --set gives them: enough to keep every kernel busy.
DEFAULT_TOKENS = 512


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parse = argparse.ArgumentParser(prog="tinyllama bench", description=__doc__)
    add_options(parse)
    return parse


def resolve(options: argparse.Namespace) -> Config:
    """The configuration with one micro-batch per step, of the requested size.

    Sizes from an option or --set are used as they are; those of the file alone are reduced to
    DEFAULT_TOKENS, since its batches are meant for hours of training. Raises ConfigError.
    """
    named = {override.partition("=")[0].strip() for override in options.set}
    config = load_config(options.config, options.set)
    if config.model.base is not None:
        from tinyllama.train.prepare import with_base

        config = with_base(config)
    context = options.context or config.context_length
    if not options.context and "data.context_length" not in named:
        context = min(context, DEFAULT_TOKENS)
    batch = options.batch or config.training.micro_batch
    sizes = {"training.batch_size", "training.micro_batch_size"}
    if not options.batch and not sizes & named:
        batch = max(1, min(batch, DEFAULT_TOKENS // context))
    if context > config.model.max_seq_len:
        raise ConfigError(
            f"--context: got {context}, must be at most model.max_seq_len,"
            f" which is {config.model.max_seq_len}"
        )
    training = dataclasses.replace(
        config.training,
        batch_size=batch,
        micro_batch_size=batch,
        dtype=options.dtype or config.training.dtype,
    )
    data = dataclasses.replace(config.data, context_length=context)
    return dataclasses.replace(config, training=training, data=data)


def make_spec(config: Config, options: argparse.Namespace, data_file: Path) -> Spec:
    """The benchmark as the workers receive it."""
    from tinygrad import Device

    model, lora = config.model, config.lora
    names = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.intermediate_size,
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
    }
    adapters = None
    if lora is not None:
        adapters = {**dataclasses.asdict(lora), "target_modules": list(lora.modules)}
    return Spec(
        model=names,
        training=dataclasses.asdict(config.training),
        batch=config.training.micro_batch,
        context=config.context_length,
        dtype=config.training.dtype,
        device=Device.DEFAULT,
        threads=options.threads or device.threads(),
        seed=config.training.seed,
        data=str(data_file),
        lora=adapters,
        config=config.to_toml(),
        compile=options.peer == "torch-compile",
    )


def check_peer_computes(model: LlamaConfig) -> None:
    """Raise ConfigError for a variant of the model that the torch peer does not have."""
    own = (model.head_size, model.scaling, model.sliding_window, model.biased or None)
    if any(part is not None for part in own):
        raise ConfigError(
            "--peer: the peer computes no head_dim, rope_scaling, sliding_window, attention_bias "
            "or mlp_bias of [model]: leave them out, or measure without --peer"
        )


def peer_spec(spec: Spec, config: Config, options: argparse.Namespace) -> Spec:
    """The same for the peer, with --peer-dtype; with --peer lora, the base is not packed.

    Raises ConfigError if --peer lora has no QLoRA to compare with.
    """
    dtype = options.peer_dtype or spec.dtype
    if options.peer != "lora":
        if options.peer is not None:
            check_peer_computes(config.model)
        return dataclasses.replace(spec, dtype=dtype)
    if config.lora is None or config.qlora is None or not config.qlora.quantize_base:
        raise ConfigError("--peer lora: compares QLoRA with LoRA: set [lora] and [qlora]")
    unpacked = dataclasses.replace(config, qlora=None).to_toml()
    return dataclasses.replace(spec, dtype=dtype, config=unpacked)


def measure(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """Run the contenders; returns the object that --json prints."""
    here = machine.describe(options.threads or device.threads())
    batch, context = config.training.micro_batch, config.context_length
    rows, data = text.batches(config, WARM_UP_STEPS + options.steps, batch, context)
    flops = model_flops(config.model, batch * context, context, config.lora)
    with tempfile.TemporaryDirectory() as folder:
        data_file = Path(folder) / "tokens.npy"
        np.save(data_file, rows)
        spec = make_spec(config, options, data_file)
        theirs = peer_spec(spec, config, options)
        commands = contenders(options.peer, options.peer_python)
        specs = {name: spec if name == "tinyllama" else theirs for name in commands}
        workers = race(commands, specs, options.steps, _show_progress)
    result = summarise(workers[0], spec, flops)
    if len(workers) > 1:
        result["peer"] = {**summarise(workers[1], theirs, flops), "dtype": theirs.dtype}
        result["ratio"] = speed_ratio(workers[0], workers[1])
        result |= _memory_ratio(result, result["peer"])
    run = {"config": options.config, "batch": batch, "context": context, "dtype": spec.dtype}
    run |= {"steps": options.steps, "warm_up_steps": WARM_UP_STEPS, "model_flops": flops}
    return {**result, "data": data, "run": run, "machine": here}


def _memory_ratio(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
    """Our memory divided by the peer's, if both used the same device."""
    if ours["device"] != peer["device"]:
        return {}
    return {"memory_ratio": ours["peak_memory_bytes"] / peer["peak_memory_bytes"]}


def _show_progress(name: str, index: int, answer: Answer) -> None:
    print(f"{name} step {index}: {answer.seconds:.3f} s, loss {answer.loss:.4f}", file=sys.stderr)


def _ops(config: Config, options: argparse.Namespace) -> int:
    from tinyllama.bench import ops

    if options.peer == "lora":
        raise ConfigError("--ops: single operations have no --peer lora, only torch")
    threads = options.threads or device.threads()
    python = options.peer_python or sys.executable
    has_torch = options.peer or options.peer_python or importlib.util.find_spec("torch")
    here = machine.describe(threads)
    results = ops.measure(config, threads, python if has_torch else None)
    if options.json:
        print(json.dumps({"operations": results, "machine": here}))
    else:
        print("\n".join([machine.line(here), machine.warning(here) or "", ops.text(results)]))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        return run(parser().parse_args(arguments))
    except TinyllamaError as error:
        print(error, file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Run the benchmark that the options describe; returns the exit code. Raises TinyllamaError."""
    device.select()
    config = resolve(options)
    if options.ops:
        return _ops(config, options)
    result = measure(config, options)
    print(json.dumps(result) if options.json else report.text(result))
    return 0
