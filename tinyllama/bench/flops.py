"""What one training step of the model costs in floating-point operations, by formula.

    6 x (parameters of the products) x tokens  +  6 L h T x tokens

2 for a multiply-add, once forward and twice backward (Kaplan et al. 2020, arXiv:2001.08361).
Attention: q k^T and p v are 4 T h a token forward, 12 T h with the backward, halved because a
causal model needs only half of them. A frozen product has no weight gradient: 4 instead of 6; its
adapter has all three. Norms, RoPE, softmax and the optimizer are left out, as everybody does.
"""

from tinyllama.config import LlamaConfig, LoraConfig


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of the products of one layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.kv_heads * config.head_dim
    return {
        "q_proj": (hidden, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def product_parameters(config: LlamaConfig) -> int:
    """Weights that are multiplied: the layers' and the head (tied or not), no others."""
    layer = sum(rows * columns for rows, columns in linear_shapes(config).values())
    return config.num_layers * layer + config.vocab_size * config.hidden_size


def adapter_parameters(config: LlamaConfig, lora: LoraConfig) -> int:
    """Weights of all LoRA matrices: r (in + out) for each wrapped product."""
    shapes = linear_shapes(config)
    return config.num_layers * lora.rank * sum(sum(shapes[name]) for name in lora.modules)


def attention_flops(config: LlamaConfig, tokens: int, context: int) -> int:
    """Forward and backward of causal attention over rows of `context` tokens."""
    return 6 * config.num_layers * config.hidden_size * context * tokens


def model_flops(
    config: LlamaConfig, tokens: int, context: int, lora: LoraConfig | None = None
) -> int:
    """Floating-point operations of one training step over `tokens` in rows of `context`."""
    products = 6 * product_parameters(config)
    if lora is not None:
        products = 4 * product_parameters(config) + 6 * adapter_parameters(config, lora)
    return products * tokens + attention_flops(config, tokens, context)
