"""LoRA adapters as mlx-lm keeps them: adapter_config.json and adapters.safetensors.

    PATH.lora_a [in, r], PATH.lora_b [r, out];  W x + scale (x lora_a) lora_b

mlx-lm has one rank and one scale for all layers, and puts adapters on the named layers of the last
`num_layers` blocks. Layers of a smaller rank are filled up with zeros, and what is left of a
layer's own scale goes into lora_b; a layer that has no adapter keeps mlx-lm's own first values,
whose lora_b is zero. Whole models need nothing of their own: mlx-lm reads Hugging Face folders.
Source: mlx_lm/tuner/utils.py and lora.py.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinyllama.errors import WeightsError
from tinyllama.formats.dtypes import NUMPY, Array, RawArray, convert
from tinyllama.formats.peft import AdapterConfig
from tinyllama.formats.safetensors import LazyArray, SafetensorsFile, write_safetensors
from tinyllama.system.untrusted import read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"

Matrix = npt.NDArray[np.float32]
# A (r, in), B (out, r) and scale of a path.
Low = tuple[Matrix, Matrix, float]


def write_adapter(
    folder: Path,
    config: AdapterConfig,
    shapes: Mapping[str, tuple[int, int]],
    load: Callable[[str], Low],
    num_layers: int,
    dtype: str,
) -> None:
    """Fill a folder that `mlx_lm.generate --adapter-path` loads.

    shapes: (out, in) by path; load: the matrices of a path; num_layers: of the model; dtype: the
    type to store ("F32", "BF16", "F16"). Raises OSError.
    """
    rank = max(place.rank for place in config.placed.values())
    scale = max(config.scale(path) for path in config.placed)
    first = min(_block(path) for path in config.placed)
    values = {
        "fine_tune_type": "lora",
        "num_layers": num_layers - first,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": config.dropout,
            "keys": sorted({path.split(".", 3)[3] for path in config.placed}),
        },
    }
    text = json.dumps(values, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(f"{text}\n", encoding="utf-8")

    def lora_a(path: str) -> Array:
        matrix = np.zeros((shapes[path][1], rank), np.float32)
        a = load(path)[0]
        matrix[:, : len(a)] = a.T
        return _stored(path, matrix, dtype)

    def lora_b(path: str) -> Array:
        _, b, own = load(path)
        matrix = np.zeros((rank, shapes[path][0]), np.float32)
        matrix[: b.shape[1]] = b.T if own == scale else b.T * np.float32(own / scale)
        return _stored(path, matrix, dtype)

    tensors = {}
    for path in config.placed:
        out, into = shapes[path]
        tensors[f"{path}.lora_a"] = LazyArray(dtype, (into, rank), partial(lora_a, path))
        tensors[f"{path}.lora_b"] = LazyArray(dtype, (rank, out), partial(lora_b, path))
    write_safetensors(folder / WEIGHTS, tensors, {"format": "mlx"})


def adapter_loader(folder: Path) -> Callable[[str], Low]:
    """What reads the matrices of a path back, as mlx-lm computes with them."""
    scale = float(read_json(folder / CONFIG)["lora_parameters"]["scale"])
    file = SafetensorsFile(folder / WEIGHTS)

    def load(path: str) -> Low:
        a, b = (file.float32(f"{path}.{part}") for part in ("lora_a", "lora_b"))
        return a.T, b.T, scale

    return load


def _block(path: str) -> int:
    """The number of a layer's block. Raises WeightsError for one outside of the blocks."""
    parts = path.split(".")
    if parts[:2] != ["model", "layers"]:
        raise WeightsError(
            f"{path}: has an adapter, and those of mlx-lm lie in the blocks only: type --merged"
        )
    return int(parts[2])


def _stored(path: str, matrix: Matrix, dtype: str) -> Array:
    values = convert(path, matrix, dtype)
    return RawArray(dtype, matrix.shape, values.astype(NUMPY[dtype], copy=False))
