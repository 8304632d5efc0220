"""Write a model with random weights: a Hugging Face folder of any size, one tensor at a time.

python tools/make_random_model.py /tmp/7b --config configs/7b.toml
python tools/make_random_model.py /tmp/small --set model.hidden_size=256 --dtype float32

The weights are the ones that a training run with this seed starts from.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama.cli.arguments import exit_code, leave
from tinyllama.config import LlamaConfig, config_from_toml, load_config
from tinyllama.errors import TinyllamaError, WeightsError
from tinyllama.formats.huggingface import llama_shapes, save_folder, weights_bytes
from tinyllama.system import device
from tinyllama.system.files import atomic_directory

DTYPES = ("bfloat16", "float16", "float32")


def make(out: Path, config: LlamaConfig, *, dtype: str, seed: int, shard_bytes: int) -> int:
    """Write the folder `out`, whole or not at all; returns the bytes of its tensors."""
    device.select()
    from tinyllama.model.initialize import first_values

    needed = weights_bytes(config, dtype)
    free = shutil.disk_usage(out.absolute().parent).free
    if needed > free:
        raise WeightsError(f"{out}: needs {needed:,} bytes of disk, {free:,} are free")
    with atomic_directory(out) as folder, ThreadPoolExecutor(device.threads()) as pool:
        tensors = {
            name: partial(first_values, name, shape, config.num_layers, seed, pool)
            for name, shape in llama_shapes(config).items()
        }
        save_folder(
            folder,
            config,
            tensors,
            dtype=dtype,
            files={},
            bos_id=1,
            eos_id=2,
            max_shard_bytes=shard_bytes,
        )
    return needed


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on standard error for a mistake in the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write, which must not exist")
    parser.add_argument("--config", help="configuration file with the sizes (default: defaults)")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="what is stored")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=2_000_000_000, help="largest file")
    options = parser.parse_args(arguments)
    try:
        if options.config is None:
            config = config_from_toml("", "the defaults", options.set)
        else:
            config = load_config(options.config, options.set)
        written = make(
            options.out,
            config.model,
            dtype=options.dtype,
            seed=options.seed,
            shard_bytes=options.shard_bytes,
        )
    except (TinyllamaError, OSError) as error:
        print(f"make_random_model: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {written:,} bytes of {options.dtype} weights")
    return 0


if __name__ == "__main__":
    leave(exit_code(main, "make_random_model"))
