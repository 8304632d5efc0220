"""Hugging Face LLaMA folders, in and out: config.json, safetensors (whole or in shards), tokenizer.

Our parameter names are Hugging Face's, and RoPE pairs (i, i + d/2) as theirs does: nothing is
renamed or permuted on the way. This is the door; what is behind it:

    hf_config.py  config.json and its neighbours; refuses by name what cannot be computed
    hf_names.py   every parameter's name and shape, and the check of a file against them
    hf_read.py    open_folder: tensors read when they are asked for
    hf_write.py   save_folder: tensors copied and stored one at a time
"""

from tinyllama.weights.hf_config import config_from_hf, config_to_hf
from tinyllama.weights.hf_names import check_names, llama_shapes, weights_bytes
from tinyllama.weights.hf_read import HfFolder, open_folder
from tinyllama.weights.hf_write import save_folder

__all__ = [
    "HfFolder",
    "check_names",
    "config_from_hf",
    "config_to_hf",
    "llama_shapes",
    "open_folder",
    "save_folder",
    "weights_bytes",
]
