"""LLaMA, as Hugging Face's LlamaForCausalLM computes it.

    x = embed(tokens)
    for each layer:  x = x + attention(norm(x));  x = x + mlp(norm(x))
    logits = head(norm(x))

Pre-RMSNorm, half-rotation RoPE, SwiGLU, causal attention with grouped queries, tied or untied
head (Touvron et al. 2023). Parameter names are Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from tinyllama.config import LlamaConfig
from tinyllama.formats.huggingface import save_folder
from tinyllama.formats.models import ModelSource, open_model
from tinyllama.formats.safetensors import FileDigest
from tinyllama.model.initialize import initialize
from tinyllama.model.layers import (
    Embedding,
    Linear,
    LinearLike,
    RMSNorm,
    TableLike,
    named_tensors,
)
from tinyllama.model.noise import EmbeddingNoise
from tinyllama.ops.attention import attention
from tinyllama.ops.cached_attention import Cache, cached_attention
from tinyllama.ops.cross_entropy import linear_cross_entropy
from tinyllama.ops.rope import rope, tables
from tinyllama.ops.swiglu import swiglu
from tinyllama.runtime.fills import finish_background_writes
from tinyllama.runtime.storage import (
    fill_in_background,
    read,
    write,
    write_new,
)
from tinyllama.system.files import atomic_directory
from tinyllama.tokenizers.tokenizer import Tokenizer

T = TypeVar("T")


class Attention:
    """Causal self-attention with rotary positions and grouped queries."""

    def __init__(self, config: LlamaConfig) -> None:
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_heads, config.kv_heads
        self.window = config.sliding_window
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        biased = config.biased
        self.q_proj: LinearLike = Linear(hidden, queries, bias="q_proj" in biased)
        self.k_proj: LinearLike = Linear(hidden, keys, bias="k_proj" in biased)
        self.v_proj: LinearLike = Linear(hidden, keys, bias="v_proj" in biased)
        self.o_proj: LinearLike = Linear(queries, hidden, bias="o_proj" in biased)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, hidden) -> q (B, T, H, D), k and v (B, T, KV, D), without positions."""
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, self.heads, self.head_dim)
        k = self.k_proj(x).reshape(B, T, self.kv_heads, self.head_dim)
        v = self.v_proj(x).reshape(B, T, self.kv_heads, self.head_dim)
        return q, k, v

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, starts: Tensor) -> Tensor:
        """x (B, T, hidden), starts (B, T) -> (B, T, hidden)."""
        out = attention(*self.project(x), starts, (cos, sin))
        return self.o_proj(out.flatten(2))  # (B, T, H * D)

    def cached(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor
    ) -> Tensor:
        """Like a call for T tokens x (1, T, hidden) of one sequence at positions position ..
        position + T - 1, or for the next tokens of T sequences at the positions position (T,).

        keys and values are those of a cache (ops/cached_attention.py), which is updated in place.
        """
        B = position.shape[0]
        q, k, v = self.project(x)  # (1, T, heads, D)
        parts = rope(q, cos, sin), rope(k, cos, sin), v
        q, k, v = (part.reshape(B, -1, *part.shape[2:]) for part in parts)
        out = cached_attention(q, k, v, Cache(keys, values), position, self.window)
        return self.o_proj(out.reshape(1, x.shape[1], -1))  # (1, T, H * D)


class MLP:
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj: LinearLike = Linear(hidden, inner, bias=config.mlp_bias)
        self.up_proj: LinearLike = Linear(hidden, inner, bias=config.mlp_bias)
        self.down_proj: LinearLike = Linear(inner, hidden, bias=config.mlp_bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, T, hidden) -> (B, T, hidden)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block:
    """One layer: attention and feed-forward, each on a normalised input, each added back."""

    def __init__(self, config: LlamaConfig) -> None:
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, starts: Tensor) -> Tensor:
        """x (B, T, hidden) -> (B, T, hidden)."""
        h = (x + self.self_attn(self.input_layernorm(x), cos, sin, starts)).contiguous()
        return h + self.mlp(self.post_attention_layernorm(h))

    def cached(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor
    ) -> Tensor:
        """The next tokens, see Attention.cached."""
        cache = keys, values, position
        h = x + self.self_attn.cached(self.input_layernorm(x), cos, sin, *cache)
        return h + self.mlp(self.post_attention_layernorm(h.contiguous()))


# A part of the model as a function of its module and of tensors, and what computes such a part.
Function = Callable[..., Tensor]
Run = Callable[..., Tensor]  # run(function, module, *inputs)


def _directly(function: Function, module: Any, *inputs: Tensor) -> Tensor:
    return function(module, *inputs)


class LlamaModel:
    """Embedding, layers and the last norm; named as in Hugging Face's checkpoints."""

    def __init__(self, config: LlamaConfig) -> None:
        self.embed_tokens: TableLike = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config) for _ in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama:
    """A LLaMA language model: `Llama(config)` has new weights, `from_pretrained` a folder's."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DType = dtypes.float32,
        seed: int | None = 0,
    ) -> None:
        """dtype is the type of activations; with seed None no weight has memory or a value yet."""
        self.config, self.dtype = config, dtype
        self.checkpoint_activations = False
        self.float32_products = "exact"  # of training steps (ops/matmul.py)
        self.noise: EmbeddingNoise | None = None
        # config.json of the model that the weights were read from, and its special ids.
        self.base_entries: dict[str, Any] = {}
        self._rotations: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.model = LlamaModel(config)
        if not config.tie_word_embeddings:
            self.lm_head: LinearLike = Linear(config.hidden_size, config.vocab_size)
        if seed is not None:
            self.initialize_later(seed)
            finish_background_writes()

    def initialize_later(self, seed: int) -> None:
        """Give every weight its first value on another thread (runtime/fills.py)."""
        weights = self.state_dict()
        fill_in_background(
            partial(initialize, weights, self.config.num_layers, seed), weights.values()
        )

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int32 -> logits (B, T, vocab) float32."""
        x = self.hidden(tokens, tokens.zeros_like())
        return self.head(x)

    def embed(
        self, embed_tokens: TableLike, tokens: Tensor, noise_key: Tensor | None = None
    ) -> Tensor:
        """tokens (B, T) int32 -> (B, T, hidden) in the activation type, with noise of a key."""
        x = embed_tokens(tokens, self.dtype)
        return x if noise_key is None or self.noise is None else self.noise(x, noise_key)

    def hidden(self, tokens: Tensor, starts: Tensor) -> Tensor:
        """tokens, starts (B, T) int32 -> the last norm's output (B, T, hidden)."""
        cos, sin = self.rotations(tokens.shape[1])
        starts = self.first_visible(starts)
        return self.walk(tokens, lambda block, x: block(x, cos, sin, starts))

    def first_visible(self, starts: Tensor) -> Tensor:
        """The first position that each one attends to, (B, T): that of its document in `starts`,
        or of its sliding window where that is later."""
        T, window = starts.shape[1], self.config.sliding_window
        if window is None or window >= T:
            return starts
        return starts.maximum(Tensor.arange(T, device=starts.device) - (window - 1)).contiguous()

    def walk(
        self, tokens: Tensor, through: Callable[[Block, Tensor], Tensor], run: Run = _directly
    ) -> Tensor:
        """Embedding, layers, last norm, for forward, loss and generation: tokens (B, T) -> (B, T,
        hidden).

        `through(block, x)` computes a layer; `run(function, module, *inputs)` computes the
        embedding and the last norm.
        """
        noise = [self.noise.noise_key] if self.noise is not None and self.noise.is_on else []
        x = run(self.embed, self.model.embed_tokens, tokens, *noise)
        for block in self.model.layers:
            x = through(block, x)
        return run(RMSNorm.__call__, self.model.norm, x)

    def head(self, x: Tensor) -> Tensor:
        """x (B, T, hidden) -> logits (B, T, vocab) float32."""
        tied = self.config.tie_word_embeddings
        return (self.model.embed_tokens.logits(x) if tied else self.lm_head(x)).float()

    def head_layer(self) -> TableLike | LinearLike:
        """What `head` multiplies by: the embedding itself when tied."""
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    def head_weight(self) -> Tensor:
        """The output matrix (vocab, hidden)."""
        return self.head_layer().dense_weight()

    def through_head(self, make: Callable[[], T]) -> T:
        """Call `make`. It is here only so that a profile names this line for the head's products,
        which the loss computes for a chunk of tokens at a time."""
        return make()

    def loss(self, tokens: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
        """Cross entropy summed over targets >= 0, in nats: tokens, targets, starts (B, T)."""
        x = self.hidden(tokens, starts)
        return linear_cross_entropy(
            x.reshape(-1, x.shape[-1]), self.head_weight(), targets.reshape(-1)
        )

    def rotations(self, length: int, rows: int | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary angles of positions 0 .. length - 1, each (length, D/2).

        `rows` is the length of the longest row, which dynamic scaling depends on, if it is not
        `length`.
        """
        c, key = self.config, (length, rows or length)
        if key not in self._rotations:
            pair = tables(c.head_dim, c.rope_theta, length, c.scaling, rows)
            # Written immediately: a step that is being captured would record a copy as one of its
            # own kernels, and keep the table in memory that only the step may read.
            cos, sin = (Tensor.empty(*table.shape) for table in pair)
            write_new(cos, pair[0])
            write_new(sin, pair[1])
            self._rotations[key] = (cos, sin)
        return self._rotations[key]

    def state_dict(self) -> dict[str, Tensor]:
        """Every weight by its Hugging Face name."""
        named = named_tensors(self)
        return {name: tensor for name, tensor in named if not name.startswith("noise.")}

    def multiplied(self) -> list[str]:
        """The names of the matrices that products read: an embedding only if it is the head too."""
        looked_up = () if self.config.tie_word_embeddings else ("model.embed_tokens.weight",)
        return [n for n, t in self.state_dict().items() if t.ndim == 2 and n not in looked_up]

    def parameters(self) -> list[Tensor]:
        """Every weight, in the order of `state_dict`."""
        return list(self.state_dict().values())

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: DType = dtypes.float32) -> Llama:
        """A Hugging Face LLaMA folder (config.json, safetensors), weights held as float32.

        The sums in a manifest.json are not read, which `train.manifest.verify_loaded` does.
        Raises WeightsError, naming every tensor that is missing, extra or misshapen.
        """
        folder = open_model(path)
        model = cls(folder.config, dtype=dtype, seed=None)
        model.read_weights(folder)
        return model

    def read_weights(self, folder: ModelSource) -> None:
        """Overwrite every weight by that of a folder, converted to float32."""
        self.remember(folder)
        for name, tensor in self.state_dict().items():
            write(tensor, folder.float32(name))
            folder.forget(name)

    def remember(self, folder: ModelSource) -> None:
        """Keep what a folder's config.json says, for the one that is written."""
        ids = {"bos_token_id": folder.bos_id, "eos_token_id": list(folder.eos_ids)}
        self.base_entries = {**folder.entries, **ids}

    def save_pretrained(
        self, path: str | Path, tokenizer: Tokenizer | None = None, *, dtype: str = "float32"
    ) -> Path:
        """Write a folder that transformers and `from_pretrained` load. It appears complete or not
        at all."""
        final = Path(path)
        with atomic_directory(final) as folder:
            self.write_folder(folder, tokenizer, dtype=dtype)
        return final

    def write_folder(
        self, folder: Path, tokenizer: Tokenizer | None, *, dtype: str = "float32"
    ) -> dict[str, FileDigest]:
        """Fill `folder` as `save_pretrained` does; returns the digests of its files."""
        base = self.base_entries
        return save_folder(
            folder,
            self.config,
            {name: partial(read, tensor) for name, tensor in self.state_dict().items()},
            dtype=dtype,
            files={} if tokenizer is None else tokenizer.files,
            bos_id=base.get("bos_token_id") if tokenizer is None else tokenizer.bos_id,
            eos_id=base.get("eos_token_id", ()) if tokenizer is None else tokenizer.eos_ids,
            base=base,
        )

    def count_parameters(self) -> int:
        """How many numbers the weights hold (a tied matrix once)."""
        return sum(t.numel() for t in self.parameters())
