"""Parameters, bytes and floating-point operations of a model, by formula and by its tensors.

    embedding v h, head v h (none where it is the embedding), norms (2 L + 1) h
    attention L (2 h n D + 2 h kv D), feed-forward L 3 h i, with biases the outputs of each layer
    adapters  r (in + out) for each linear layer that has one

All counts are Python integers, exact for models of any size. tinygrad is not needed.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import NamedTuple

from tinyllama.config import LlamaConfig, LoraConfig
from tinyllama.config.sections import ATTENTION_LINEAR, MLP_LINEAR
from tinyllama.formats.huggingface import EMBEDDING, linear_shapes
from tinyllama.formats.models import open_model
from tinyllama.formats.peft import is_adapter, open_adapter

# Bits per weight that are supported.
WIDTHS = (32, 16, 8, 4, 2)
SCALE_BITS = 16  # one float16 per group of packed weights

# The first of these that is in a tensor's name decides to which part the tensor belongs.
_PART_WORDS = {
    "lora_": "adapters",
    "embed_tokens": "embedding",
    "lm_head": "head",
    "norm": "norms",
    "self_attn": "attention",
    "mlp": "feed_forward",
}


@dataclass(frozen=True)
class Parameters:
    """How many numbers each part of a model holds."""

    embedding: int = 0
    attention: int = 0
    feed_forward: int = 0
    norms: int = 0
    head: int = 0
    adapters: int = 0

    @property
    def total(self) -> int:
        """What a forward pass uses."""
        return sum(self.table().values())

    @property
    def base(self) -> int:
        """Everything but adapters."""
        return self.total - self.adapters

    @property
    def trainable(self) -> int:
        """The adapters where there are any, or else everything."""
        return self.adapters or self.total

    def table(self) -> dict[str, int]:
        """Count by part, in the order in which the data meets them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def attention_parameters(config: LlamaConfig) -> int:
    """Weights of one layer's q, k, v and o: 2 h n D + 2 h kv D, which is 4 h^2 without groups and
    with heads that divide h; and their biases."""
    return attention_weights(config) + _biases(config, ATTENTION_LINEAR)


def attention_weights(config: LlamaConfig) -> int:
    """The same without biases: what is in matrix products."""
    heads = config.num_heads + config.kv_heads
    return 2 * config.hidden_size * heads * config.head_dim


def feed_forward_parameters(config: LlamaConfig) -> int:
    """Weights of one layer's gate, up and down: 3 h i; and their biases."""
    return feed_forward_weights(config) + _biases(config, MLP_LINEAR)


def feed_forward_weights(config: LlamaConfig) -> int:
    """The same without biases: 3 h i."""
    return 3 * config.hidden_size * config.intermediate_size


def _biases(config: LlamaConfig, names: Iterable[str]) -> int:
    """Biases of those layers of one block: one per output."""
    shapes = linear_shapes(config)
    return sum(shapes[name][0] for name in names if name in config.biased)


def layer_parameters(config: LlamaConfig) -> int:
    """Weights of one layer, its two norms included."""
    return attention_parameters(config) + feed_forward_parameters(config) + 2 * config.hidden_size


def adapter_parameters(config: LlamaConfig, lora: LoraConfig) -> int:
    """Weights of all adapters: A [r, in] and B [out, r] for each adapted linear layer."""
    shapes = linear_shapes(config)
    return config.num_layers * lora.rank * sum(sum(shapes[name]) for name in lora.modules)


def parameters(config: LlamaConfig, lora: LoraConfig | None = None) -> Parameters:
    """The counts by formula; `parameters_of` counts given tensors."""
    table = config.vocab_size * config.hidden_size
    return Parameters(
        embedding=table,
        attention=config.num_layers * attention_parameters(config),
        feed_forward=config.num_layers * feed_forward_parameters(config),
        norms=(2 * config.num_layers + 1) * config.hidden_size,
        head=0 if config.tie_word_embeddings else table,
        adapters=0 if lora is None else adapter_parameters(config, lora),
    )


def part_of(name: str) -> str:
    """The part that a tensor belongs to, by its name in Hugging Face's or PEFT's spelling."""
    for word, part in _PART_WORDS.items():
        if word in name:
            return part
    raise ValueError(f"{name}: belongs to no part of a LLaMA")


def parameters_of(counts: Iterable[tuple[str, int]]) -> Parameters:
    """The counts of named tensors, given as (name, elements), by part."""
    totals: dict[str, int] = {}
    for name, count in counts:
        part = part_of(name)
        totals[part] = totals.get(part, 0) + count
    return Parameters(**totals)


def folder_parameters(folder: str | Path) -> Parameters:
    """The counts of a model's folder, or of an adapter's with the base that it names.

    By the tensors in the files; only headers are read. Raises ConfigError and WeightsError.
    """
    if not is_adapter(folder):
        opened = open_model(folder)
        return parameters_of((name, prod(opened.shape(name))) for name in opened.names)
    adapter, opened = open_adapter(folder)
    shapes = {name: opened.shape(name) for name in opened.names}
    placed = adapter.config(opened.config).placed
    for path, place in placed.items():
        out, into = shapes.get(f"{path}.weight", shapes[EMBEDDING])  # of a tied head
        shapes |= {f"{path}.lora_A": (place.rank, into), f"{path}.lora_B": (out, place.rank)}
    return parameters_of((name, prod(shape)) for name, shape in shapes.items())


def bytes_of(count: int, bits: int) -> int:
    """Bytes of `count` numbers of `bits` each, packed and rounded up to whole bytes."""
    return -(-count * bits // 8)


def packed_bytes(outputs: int, inputs: int, bits: int, block_size: int) -> tuple[int, int]:
    """Bytes of a packed weight (outputs, inputs): its values, and its scales of float16.

    Every output has a scale for each group of `block_size` inputs.
    """
    return bytes_of(outputs * inputs, bits), bytes_of(outputs * inputs // block_size, SCALE_BITS)


def packed_linear_bytes(config: LlamaConfig, bits: int, block_size: int) -> tuple[int, int]:
    """Bytes of values and of scales when every linear layer of the blocks is packed."""
    pairs = [packed_bytes(*shape, bits, block_size) for shape in linear_shapes(config).values()]
    values, scales = map(sum, zip(*pairs, strict=True))
    return config.num_layers * values, config.num_layers * scales


def training_bytes(count: int, state_bits: int = 32) -> int:
    """Weights and gradients in float32 and AdamW's two moments: 16 bytes per parameter, or 12 with
    a state in bfloat16."""
    return 2 * bytes_of(count, 32) + 2 * bytes_of(count, state_bits)


# ---- floating-point operations


def product_parameters(config: LlamaConfig) -> int:
    """Weights in matrix products: those of the layers and the head (tied or not)."""
    layer = attention_weights(config) + feed_forward_weights(config)
    return config.num_layers * layer + config.vocab_size * config.hidden_size


def attention_flops(config: LlamaConfig, tokens: int, context: int) -> int:
    """Forward and backward of causal attention over rows of `context` tokens.

    q k^T and p v are 4 T n D per token forward, 12 T n D with the backward pass, halved because a
    causal model needs only half of them. A sliding window W leaves W (2 T - W) of the T^2.
    """
    window = min(config.sliding_window or context, context)
    width = config.num_heads * config.head_dim
    return 6 * config.num_layers * width * window * (2 * context - window) * tokens // context


def model_flops(
    config: LlamaConfig, tokens: int, context: int, lora: LoraConfig | None = None
) -> int:
    """Floating-point operations of one training step over `tokens` in rows of `context`.

    6 per weight and token: 2 for a multiply-add, once forward and twice backward (Kaplan et al.
    2020, arXiv:2001.08361). A frozen product has no weight gradient, so 4; its adapter has all
    three. Norms, RoPE, softmax and the optimizer are left out, as is usual.
    """
    products = 6 * product_parameters(config)
    if lora is not None:
        products = 4 * product_parameters(config) + 6 * adapter_parameters(config, lora)
    return products * tokens + attention_flops(config, tokens, context)


# ---- published and true


class Claim(NamedTuple):
    """One line of the table "published / true / why"."""

    what: str
    published: str
    true: str
    why: str


def published_claims() -> list[Claim]:
    """What an older description of this system says, what the code computes, and why."""
    toy, big = LlamaConfig.toy_124m(), LlamaConfig.llama2_7b()
    rank_64 = LoraConfig(rank=64, alpha=128.0)
    small, large = parameters(toy).total, parameters(big, rank_64)
    values, scales = packed_linear_bytes(big, 4, 64)
    rest = large.embedding + large.head
    packed = values + scales + bytes_of(rest, 16) + bytes_of(large.norms, 32)
    return [
        Claim(
            "124m, parameters",
            f"{162_398_208:,}",
            f"{small:,}",
            f"the {2 * toy.num_layers + 1} RMSNorm weights were left out",
        ),
        Claim(
            "7b, rank-64 adapters on q, k, v, o",
            f"{8_388_608:,}",
            f"{large.adapters:,}",
            "the published figure is that of rank 8",
        ),
        Claim(
            "124m, FP32 weights",
            "500 MB",
            megabytes(bytes_of(small, 32)),
            "124 million is GPT-2 small's count: a tied head, two matrices per feed-forward layer",
        ),
        Claim(
            "7b, FP32 weights", "28 GB", gigabytes(bytes_of(large.base, 32)), "7b is 6.74 billion"
        ),
        Claim(
            "7b, full FP32 fine-tuning with AdamW, before activations",
            "28 GB",
            gigabytes(training_bytes(large.base)),
            "16 bytes per parameter: weights, gradients and two moments; "
            f"{gigabytes(training_bytes(large.base, 16))} with moments in bfloat16",
        ),
        Claim(
            "7b, linear layers int4 in groups of 64, the rest bf16",
            "7.5 GB",
            gigabytes(packed),
            "4.25 bits per packed weight; embeddings and head are 524 MB",
        ),
        Claim(
            "7b, rank-64 adapters, FP32",
            "32 MB",
            megabytes(bytes_of(large.adapters, 32)),
            "8 times as many, 4 bytes each",
        ),
    ]


def megabytes(count: int) -> str:
    """Bytes as MB (a million)."""
    return f"{count / 1e6:,.1f} MB"


def gigabytes(count: int) -> str:
    """Bytes as GB (a thousand million)."""
    return f"{round(count / 1e9, 2) + 0.0:,.2f} GB"  # never -0.00


def aligned(rows: Iterable[Mapping[str, str]], left: Collection[str] = ()) -> str:
    """Rows of equal keys as a text table; the first column and `left` are left-aligned."""
    lines = [dict(row) for row in rows]
    table = [{key: key for key in lines[0]}, *lines]
    widths = {key: max(len(line[key]) for line in table) for key in lines[0]}
    texts = {key: str.ljust if key in left else str.rjust for key in lines[0]}
    texts[next(iter(lines[0]))] = str.ljust
    return "\n".join(
        "  ".join(texts[key](line[key], widths[key]) for key in line).rstrip() for line in table
    )
