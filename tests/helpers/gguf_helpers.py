"""Small GGUF files of random LLaMA models, written by the `gguf` library."""

import gguf
import numpy as np

from tinyllama.config import LlamaConfig
from tinyllama.formats.huggingface import llama_shapes

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=512,
    max_seq_len=64,
    tie_word_embeddings=True,
)
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    """GGUF's name of a Hugging Face parameter."""
    if name in NAMES:
        return NAMES[name]
    _, _, number, rest = name.split(".", 3)
    return f"blk.{number}.{LAYER[rest.removesuffix('.weight')]}.weight"


def to_pairs(weight, heads):
    """Rows of q or k from halves to pairs, as INTEROP's formula has it."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, -1)


def random_blocks(kind, shape, seed):
    """Bytes of random blocks (rows, bytes per row) whose values have a deviation of about 0.03."""
    rng = np.random.default_rng(seed)
    quantized = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[quantized]
    rows, columns = shape
    if kind in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        weight = rng.standard_normal(shape).astype(np.float32) * np.float32(0.03)
        return gguf.quantize(weight, quantized)
    raw = rng.integers(0, 256, (rows * columns // values, size), dtype=np.uint8)
    places = {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}[kind]
    for place in places:
        scale = rng.uniform(2e-5, 4e-5, (len(raw), 1)).astype(np.float16)
        raw[:, place : place + 2] = scale.view(np.uint8)
    return raw.reshape(rows, -1)


def write_gguf(path, kind="F32", config=CONFIG, seed=0, kinds=None, change=None, metadata=None):
    """Write a random model; matrices are of type `kind` (or kinds[name]). Returns name -> float32
    value, by Hugging Face's names and in their order of rows.

    change(writer) may add metadata; metadata overrides llama.* integers and floats.
    """
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {
        "block_count": config.num_layers,
        "context_length": config.max_seq_len,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.kv_heads,
        "rope.dimension_count": config.head_dim,
    } | (metadata or {})
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.rope.freq_base", config.rope_theta)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    writer.add_array("tokenizer.ggml.tokens", [f"<{i}>" for i in range(config.vocab_size)])
    writer.add_array("tokenizer.ggml.token_type", [1] * config.vocab_size)
    if change is not None:
        change(writer)
    values = {}
    for number, (name, shape) in enumerate(llama_shapes(config).items()):
        if len(shape) == 1:
            values[name] = 1 + np.arange(shape[0], dtype=np.float32) / 1024
            writer.add_tensor(gguf_name(name), values[name])
            continue
        stored = (kinds or {}).get(name, kind)
        raw = random_blocks(stored, shape, seed + number)
        quantized = gguf.GGMLQuantizationType[stored]
        values[name] = gguf.dequantize(raw, quantized).reshape(shape)
        heads = {"q_proj": config.num_heads, "k_proj": config.kv_heads}.get(name.split(".")[-2])
        if heads:
            raw = to_pairs(raw, heads)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
