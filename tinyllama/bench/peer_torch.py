"""The peer: LLaMA in plain PyTorch, as fast as eager PyTorch goes, for comparison only.

Equal to transformers' LlamaForCausalLM (same parameter names, logits to 1e-5) without its
overheads. With LoRA it is peft's formula, y = x W^T + (alpha/r) (x A^T) B^T, the base frozen.
Where PyTorch has several ways to write an operation, this is the one that measured fastest.
"""

import math
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def weight_shapes(model: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape, from a Hugging Face config."""
    hidden, inner = model["hidden_size"], model["intermediate_size"]
    kv = hidden // model["num_attention_heads"] * model["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (model["vocab_size"], hidden)
    }
    for index in range(model["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (kv, hidden)
        shapes[f"{layer}.self_attn.v_proj.weight"] = (kv, hidden)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not model["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (model["vocab_size"], hidden)
    return shapes


def random_weights(model: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Normal(0, 0.02) matrices and unit norms, float32."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes(model).items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
        else:
            weights[name] = torch.empty(shape).normal_(0.0, 0.02, generator=generator)
    return weights


def random_adapters(model: dict[str, Any], lora: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """`….lora_A.weight` (r, in) Kaiming-uniform and `….lora_B.weight` (out, r) zero."""
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for name, shape in weight_shapes(model).items():
        path = name.removesuffix(".weight")
        if path.rsplit(".", 1)[-1] in lora["target_modules"]:
            bound = 1.0 / math.sqrt(shape[1])  # kaiming_uniform with a = sqrt(5)
            down = torch.empty(lora["rank"], shape[1]).uniform_(-bound, bound, generator=generator)
            adapters[f"{path}.lora_A.weight"] = down
            adapters[f"{path}.lora_B.weight"] = torch.zeros(shape[0], lora["rank"])
    return adapters


def lora_scale(lora: dict[str, Any]) -> float:
    rank = lora["rank"]
    return float(lora["alpha"] / (math.sqrt(rank) if lora.get("use_rslora") else rank))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of (B, T, H, D) over the pairs (i, i + D/2); cos and sin (T, 1, D/2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class PeerLlama:
    """Weights by their Hugging Face names, and the forward pass over them."""

    beside = ""  # libraries used besides PyTorch

    def __init__(
        self,
        model: dict[str, Any],
        weights: dict[str, Tensor],
        lora: dict[str, Any] | None = None,
        adapters: dict[str, Tensor] | None = None,
        *,
        checkpoint_activations: bool = False,
    ) -> None:
        self.model, self.weights, self.adapters = model, weights, adapters or {}
        self.scale = lora_scale(lora) if lora else 0.0
        self.dropout = lora["dropout"] if lora else 0.0
        self.checkpoint_activations = checkpoint_activations
        self.head_dim = model["hidden_size"] // model["num_attention_heads"]
        for tensor in weights.values():
            tensor.requires_grad_(not self.adapters)
        for tensor in self.adapters.values():
            tensor.requires_grad_(True)

    def to(self, device: str) -> Self:
        """The same on a device of PyTorch's."""
        for tensors in (self.weights, self.adapters):
            for name, tensor in tensors.items():
                moved = tensor.detach().to(device)
                tensors[name] = moved.requires_grad_(tensor.requires_grad)
        return self

    def trainable(self) -> list[Tensor]:
        return list((self.adapters or self.weights).values())

    def base_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.weights.values())

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of RoPE, (T, 1, D/2) each."""
        steps = torch.arange(0, self.head_dim, 2).float() / self.head_dim
        angles = torch.outer(torch.arange(length).float(), self.model["rope_theta"] ** -steps)
        return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) -> logits (B, T, vocab)."""
        x = F.embedding(tokens, self.weights["model.embed_tokens.weight"])
        cos, sin = self.tables(tokens.shape[1])
        for index in range(self.model["num_hidden_layers"]):
            if self.checkpoint_activations:
                x = checkpoint(self.block, x, index, cos, sin, use_reentrant=False)
            else:
                x = self.block(x, index, cos, sin)
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return F.linear(self.norm(x, "model.norm"), head)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross entropy of predicting tokens[:, 1:] from tokens[:, :-1]; float32."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def block(self, x: Tensor, index: int, cos: Tensor, sin: Tensor) -> Tensor:
        layer = f"model.layers.{index}"
        x = x + self.attention(self.norm(x, f"{layer}.input_layernorm"), layer, cos, sin)
        hidden = self.norm(x, f"{layer}.post_attention_layernorm")
        gate = self.linear(hidden, f"{layer}.mlp.gate_proj")
        up = self.linear(hidden, f"{layer}.mlp.up_proj")
        return x + self.linear(F.silu(gate) * up, f"{layer}.mlp.down_proj")

    def attention(self, x: Tensor, layer: str, cos: Tensor, sin: Tensor) -> Tensor:
        heads, kv_heads = self.model["num_attention_heads"], self.model["num_key_value_heads"]
        q = self.split(self.linear(x, f"{layer}.self_attn.q_proj"), heads)
        k = self.split(self.linear(x, f"{layer}.self_attn.k_proj"), kv_heads)
        v = self.split(self.linear(x, f"{layer}.self_attn.v_proj"), kv_heads)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
        return self.linear(y.transpose(1, 2).flatten(2), f"{layer}.self_attn.o_proj")

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.head_dim))  # (B, T, H, D)

    def norm(self, x: Tensor, path: str) -> Tensor:
        # F.rms_norm takes a tenth longer on a CPU.
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.model["rms_norm_eps"])
        return x * rstd * self.weights[f"{path}.weight"]

    def linear(self, x: Tensor, path: str) -> Tensor:
        y = F.linear(x, self.weights[f"{path}.weight"])
        down = self.adapters.get(f"{path}.lora_A.weight")
        if down is None:
            return y
        x = F.dropout(x, self.dropout)
        # The scale goes on the narrow side: the same value as peft's, and cheaper.
        return y + F.linear(F.linear(x, down) * self.scale, self.adapters[f"{path}.lora_B.weight"])
