"""What the tests of the model share: small models, batches, and LLaMA in numpy by its formula."""

import functools

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import Ops

from tinyllama.config import LlamaConfig
from tinyllama.data.batches import Batch
from tinyllama.formats.huggingface import EMBEDDING, HEAD, llama_shapes
from tinyllama.model.llama import Llama
from tinyllama.ops import forms
from tinyllama.runtime.storage import read, write
from tinyllama.train.gradients import StagedLoss

# No size is a multiple of a vector or a tile by accident; eps is large enough to be seen.
GROUPED = LlamaConfig(
    vocab_size=131,
    hidden_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=72,
    max_seq_len=64,
    rope_theta=1000.0,
    rms_norm_eps=1e-3,
)
TIED = LlamaConfig(**{**GROUPED.__dict__, "tie_word_embeddings": True})
EVERY_HEAD = LlamaConfig(**{**GROUPED.__dict__, "num_kv_heads": None})
ONE_KEY = LlamaConfig(**{**GROUPED.__dict__, "num_kv_heads": 1})
# All products of this one have a single shape, so that a training step compiles fast.
SQUARE = LlamaConfig(
    vocab_size=32,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    intermediate_size=32,
    max_seq_len=64,
)
ROWS, LENGTH = 2, 33


def random_weights(config, seed=0):
    """Weights large enough that every part of the model matters, norms unlike 1."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in llama_shapes(config).items():
        values = rng.standard_normal(shape)
        around = 0 if name.endswith(".bias") else 1
        weights[name] = around + 0.3 * values if len(shape) == 1 else values / np.sqrt(shape[1])
    return {name: values.astype(np.float32) for name, values in weights.items()}


def build(config, weights=None, dtype=dtypes.float32):
    """A model that holds `weights`, by default those of `random_weights`."""
    model = Llama(config, dtype=dtype, seed=None)
    weights = random_weights(config) if weights is None else weights
    for name, tensor in model.state_dict().items():
        write(tensor, weights[name])
    return model


def random_batch(config, rows=ROWS, length=LENGTH, seed=0):
    """Tokens with two documents in each row (of two and more); the last target is not trained."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (rows, length)).astype(np.int32)
    targets = np.roll(tokens, -1, 1)
    targets[:, -1] = -1
    starts = np.zeros_like(tokens)
    for row in range(rows):
        cut = length // 3 + 5 * row
        targets[row, cut - 1] = -1
        starts[row, cut:] = cut
    return Batch(tokens, targets, starts)


def kernel_texts(stage):
    """The texts of our kernels in all pieces that a stage has scheduled."""
    nodes = (u for t in stage._templates.values() for u in t.kernels.toposort())
    return {node.arg for node in nodes if node.op is Ops.SOURCE}


def on_device(batch):
    return [Tensor(part).realize() for part in batch]


@functools.cache
def loss_and_gradients(config, form="cpu", dtype=dtypes.float32, checkpoint=False):
    """Summed loss of `random_batch` and its gradient by name, as the training step gets them."""
    with forms.forced(form):
        model = build(config, dtype=dtype)
        model.checkpoint_activations = checkpoint
        staged = StagedLoss(model, model.state_dict())
        loss, grads = staged.gradients(*on_device(random_batch(config)))
        return float(loss.item()), {name: read(g).copy() for name, g in grads.items()}


def difference(found, expected, floor=1e-30):
    """Largest difference, relative to the largest expected value, or to `floor` if that is less."""
    expected = np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    worst = np.abs(np.asarray(found, np.float64) - expected).max()
    return float(worst / max(np.abs(expected).max(), floor))


def reference_logits(weights, config, tokens, starts=None):
    """LLaMA in float64: tokens (B, T) -> logits (B, T, vocab).

    norm(x) = x / sqrt(mean(x^2) + eps) w;  x += Wo attention(norm(x));
    x += Wdown (silu(Wgate n) * (Wup n)), n = norm(x);  logits = W norm(x).
    """
    w = {name: np.asarray(values, np.float64) for name, values in weights.items()}
    x = w[EMBEDDING][tokens]
    for i in range(config.num_layers):
        part = {n.split(f"layers.{i}.")[1]: v for n, v in w.items() if f"layers.{i}." in n}
        n = _norm(x, part["input_layernorm.weight"], config.rms_norm_eps)
        x = x + _attention(n, part, config, starts)
        n = _norm(x, part["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = _linear(n, part, "mlp.gate_proj")
        inner = gate / (1 + np.exp(-gate)) * _linear(n, part, "mlp.up_proj")
        x = x + _linear(inner, part, "mlp.down_proj")
    x = _norm(x, w["model.norm.weight"], config.rms_norm_eps)
    return x @ w[EMBEDDING if config.tie_word_embeddings else HEAD].T


def reference_loss(weights, config, batch):
    """-log softmax(logits)[target], in nats, summed over the targets that are not -1."""
    logits = reference_logits(weights, config, batch.tokens, batch.starts)
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top
    picked = np.take_along_axis(log_sum - logits, np.maximum(batch.targets, 0)[..., None], -1)
    return float(picked[..., 0][batch.targets >= 0].sum())


def _norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _linear(x, part, name):
    return x @ part[f"{name}.weight"].T + part.get(f"{name}.bias", 0)


def _attention(n, part, config, starts):
    """Head h looks at key head h // (heads / key heads), at no later token of its document and at
    none before its window."""
    B, T, _ = n.shape
    H, KV, D = config.num_heads, config.kv_heads, config.head_dim
    q, k, v = (
        _linear(n, part, f"self_attn.{name}_proj").reshape(B, T, heads, D)
        for name, heads in (("q", H), ("k", KV), ("v", KV))
    )
    q, k = _rotate(q, config.rope_theta), _rotate(k, config.rope_theta)
    position = np.arange(T)
    seen = np.broadcast_to(position <= position[:, None], (B, T, T))
    if config.sliding_window is not None:
        seen = seen & (position[:, None] - position < config.sliding_window)
    if starts is not None:
        seen = seen & (position >= starts[:, :, None])
    out = np.empty((B, T, H, D))
    for h in range(H):
        group = h // (H // KV)
        scores = np.einsum("btd,bsd->bts", q[:, :, h], k[:, :, group]) / np.sqrt(D)
        p = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        p /= p.sum(-1, keepdims=True)
        out[:, :, h] = np.einsum("bts,bsd->btd", p, v[:, :, group])
    return _linear(out.reshape(B, T, H * D), part, "self_attn.o_proj")


def _rotate(x, theta):
    """The pair (x_i, x_{i+D/2}), as a complex number, times exp(i position theta^(-2i/D))."""
    T, D = x.shape[1], x.shape[3]
    angle = np.outer(np.arange(T), theta ** (-2 * np.arange(D // 2) / D))
    pair = (x[..., : D // 2] + 1j * x[..., D // 2 :]) * np.exp(1j * angle)[None, :, None]
    return np.concatenate([pair.real, pair.imag], -1)
