"""Compare the time to a warm first loss: kernels from our cache, and from tinygrad's cache.db.

New processes train a small model for one step, in turn with the one and the other; both caches are
warm: a process that compiled anything ends the comparison. tinygrad's database holds pickles, which
is why a run never opens it: here it is in a folder of its own, and only what this tool made is in
it.

    python tools/kernel_caches.py [--device CPU] [--pairs 15]

CUDA without a card: docs/cuda.md says how to build a driver that runs nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
[model]
vocab_size = 512
hidden_size = 128
num_layers = 4
num_heads = 4
max_seq_len = 128
[training]
batch_size = 4
max_steps = 1
[lr_schedule]
warmup_steps = 1
[data]
train_path = "{folder}/text.txt"
tokenizer = "train"
tokenizer_vocab_size = 512
cache_dir = "{folder}/tokens"
[checkpointing]
checkpoint_dir = "{folder}/run"
"""


def first_loss(config: Path, cache: str) -> None:
    """In a process of its own: train one step, and print the seconds to its loss, of the clock and
    of processors."""
    began = time.perf_counter()
    sys.path.insert(0, str(ROOT))
    if cache == "tinygrad":
        use_tinygrads()
    from tinyllama.cli.app import main
    from tinyllama.train import trainer

    missing = count_misses()

    def timed(self: trainer.Trainer, metrics: Any, line: dict[str, Any]) -> None:
        taken = [time.perf_counter() - began, time.process_time(), line["loss"], len(missing)]
        print(json.dumps(taken), flush=True)
        os._exit(0)

    trainer.Trainer._write = timed  # type: ignore[method-assign]
    main(["train", str(config), "--quiet", "--force"])


def count_misses() -> list[str]:
    """A list that grows with each kernel that is looked for in either cache and is not there."""
    from tinygrad import device

    from tinyllama.runtime import kernel_cache

    missing: list[str] = []

    def counted(looked_up: Any) -> Any:
        def look_up(*key: str) -> Any:
            found = looked_up(*key)
            if found is None:
                missing.append(key[0])
            return found

        return look_up

    device.diskcache_get = counted(device.diskcache_get)
    kernel_cache.get = counted(kernel_cache.get)
    return missing


def use_tinygrads() -> None:
    """Compile and keep kernels as tinygrad does, without our patch and without compiling ahead."""
    from tinyllama.runtime import patches, precompile

    patches.PATCHES = tuple(p for p in patches.PATCHES if p.name != "kernel_cache")
    precompile._threads_may_compile = lambda device: False  # type: ignore[assignment]


def measured(
    config: Path, cache: str, environment: dict[str, str]
) -> tuple[float, float, float, int]:
    """Seconds of the clock, seconds of processors, loss, kernels compiled, of one new process."""
    words = [sys.executable, __file__, "--first-loss", str(config), "--cache", cache]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    clock, processor, loss, missing = json.loads(done.stdout.splitlines()[-1])
    return clock, processor, loss, missing


def compare(device: str, pairs: int) -> str:
    """The medians of both, and of the ratio within each pair, as a line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "tiny.toml"
        config.write_text(CONFIG.format(folder=folder))
        (folder / "text.txt").write_text((ROOT / "docs" / "files.md").read_text())
        environment = {
            **os.environ, "DEV": device, "NUM_CPU_THREADS": "1",
            "CACHEDB": str(folder / "cache.db"), "TINYLLAMA_KERNEL_CACHE": str(folder / "kernels"),
        }  # fmt: skip
        caches = ("ours", "tinygrad")
        for cache in caches:
            if not measured(config, cache, environment)[3]:
                raise SystemExit(f"{device}: nothing was compiled into the cache of {cache}")
        times = [
            {cache: measured(config, cache, environment) for cache in caches[:: 1 - 2 * (n % 2)]}
            for n in range(pairs)
        ]
        kept = [
            len(list((folder / "kernels").iterdir())),
            sum(file.stat().st_size for file in folder.glob("cache.db*")),  # its log too
        ]
    found = [values for pair in times for values in pair.values()]
    if len({loss for _, _, loss, _ in found}) > 1 or any(missing for *_, missing in found):
        raise SystemExit(f"{device}: losses differ, or a cache was not warm: {found}")
    medians = [
        statistics.median(pair[cache][column] for pair in times)
        for column in (0, 1)
        for cache in caches
    ]
    ratios = [
        statistics.median(pair["ours"][column] / pair["tinygrad"][column] for pair in times)
        for column in (0, 1)
    ]
    return (
        f"| {device} | {medians[0]:.2f} s | {medians[1]:.2f} s | {ratios[0]:.3f} | "
        f"{medians[2]:.2f} s | {medians[3]:.2f} s | {ratios[1]:.3f} | {kept[0]} files, "
        f"{kept[1] >> 10} KB |"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--device", action="append", help="CPU, CL or CUDA (default: CPU)")
    options.add_argument("--pairs", type=int, default=15)
    options.add_argument("--first-loss", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--cache", choices=("ours", "tinygrad"), help=argparse.SUPPRESS)
    given = options.parse_args(arguments)
    if given.first_loss:
        first_loss(given.first_loss, given.cache)
        return 0
    for device in given.device or ["CPU"]:
        print(compare(device, given.pairs), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
