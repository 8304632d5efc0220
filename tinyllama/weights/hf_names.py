"""Names and shapes of a LLaMA's parameters, as Hugging Face has them, and their check."""

import math
from collections.abc import Mapping

from tinyllama.config import LlamaConfig
from tinyllama.errors import WeightsError
from tinyllama.weights.dtypes import BITS, FLOATS

STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

Shape = tuple[int, ...]


def llama_shapes(config: LlamaConfig) -> dict[str, Shape]:
    """Every parameter's name and shape, in the order of the data's way; weights are [out, in]."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, hidden)}
    layer: dict[str, Shape] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for number in range(config.num_layers):
        shapes |= {f"model.layers.{number}.{name}.weight": layer[name] for name in layer}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def weights_bytes(config: LlamaConfig, dtype: str) -> int:
    """Bytes that a folder's tensors take when stored as `dtype`."""
    values = sum(math.prod(shape) for shape in llama_shapes(config).values())
    return values * BITS[STORED[dtype]] // 8


def check_names(
    expected: Mapping[str, Shape], found: Mapping[str, tuple[str, Shape]], source: str
) -> None:
    """Compare parameters with what a file holds, name by (type, shape).

    Raises WeightsError that names every tensor that is missing, extra, misshapen or not floating.
    """
    problems = [f"{name}: missing" for name in expected if name not in found]
    problems += [f"{name}: extra, no such parameter" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        dtype, shape = found[name]
        if shape != expected[name]:
            problems.append(f"{name}: shape {shape}, must be {expected[name]}")
        if dtype not in FLOATS:
            problems.append(f"{name}: type {dtype}, must be one of {', '.join(FLOATS)}")
    if problems:
        raise WeightsError("\n".join(f"{source}: {problem}" for problem in sorted(problems)))
