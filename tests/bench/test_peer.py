"""The PyTorch peer is what it says: transformers' model, peft's adapters, and it learns."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from bench_helpers import small_spec

from tinyllama.bench.runner import race, worker_command


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_peer_equals_transformers(tied: bool, kv_heads: int) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tinyllama.bench.peer_torch import PeerLlama, random_weights

    sizes = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "rms_norm_eps": 1e-5}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": kv_heads, "intermediate_size": 96}
    model = {**sizes, "rope_theta": 10000.0, "tie_word_embeddings": tied}
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, tie_word_embeddings=tied)
    )
    weights = random_weights(model, seed=3)
    missing = reference.load_state_dict(weights, strict=False).missing_keys
    assert missing == (["lm_head.weight"] if tied else [])
    tokens = torch.randint(0, 99, (2, 33))
    peer = PeerLlama(model, weights)
    wanted = reference(tokens).logits
    assert (peer(tokens) - wanted).abs().max() < 1e-5
    again = PeerLlama(model, weights, checkpoint_activations=True)
    peer.loss(tokens).backward()
    first = weights["model.layers.0.self_attn.k_proj.weight"].grad.clone()
    again.loss(tokens).backward()
    both = weights["model.layers.0.self_attn.k_proj.weight"].grad
    assert torch.allclose(both, 2 * first, atol=1e-7) and first.abs().max() > 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_peers_adapters_equal_peft() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    from tinyllama.bench.peer_torch import PeerLlama, random_adapters, random_weights

    sizes = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "rms_norm_eps": 1e-5}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96}
    model = {**sizes, "rope_theta": 10000.0, "tie_word_embeddings": False}
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["q_proj", "down_proj"]}
    weights = random_weights(model, seed=3)
    adapters = random_adapters(model, lora, seed=4)
    for name, tensor in adapters.items():
        if name.endswith("lora_B.weight"):
            tensor.normal_()
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    reference.load_state_dict(weights)
    wanted = peft.LoraConfig(r=4, lora_alpha=8, target_modules=lora["target_modules"])
    adapted = peft.get_peft_model(reference, wanted)
    named = {f"base_model.model.{name}": tensor for name, tensor in adapters.items()}
    peft.set_peft_model_state_dict(adapted, named)
    tokens = torch.randint(0, 99, (2, 33))
    peer = PeerLlama(model, weights, lora, adapters)
    assert (peer(tokens) - adapted(tokens).logits).abs().max() < 1e-5
    assert len(peer.trainable()) == 2 * 2 * 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_with_peft_the_peer_computes_the_same_loss(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from tinyllama.bench.peer_peft import PeftLlama
    from tinyllama.bench.peer_torch import PeerLlama

    model = {**small_spec(tmp_path).model, "rope_theta": 500.0}
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["q_proj", "down_proj"]}
    theirs = PeftLlama(model, lora, "float32", seed=3)
    for tensor in theirs.trainable():
        tensor.data.normal_()
    named = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".default", ""): p
        for name, p in theirs.model.named_parameters()
    }
    adapters = {name: tensor for name, tensor in named.items() if "lora_" in name}
    weights = {name: tensor for name, tensor in named.items() if "lora_" not in name}
    ours = PeerLlama(model, weights, lora, adapters)
    tokens = torch.randint(0, model["vocab_size"], (2, 33))
    assert (ours.loss(tokens) - theirs.loss(tokens)).abs() < 1e-5
    assert len(theirs.trainable()) == len(adapters) == 2 * 2 * 2
    assert theirs.base_parameters() == ours.base_parameters()
    again = PeftLlama(model, lora, "float32", seed=3, checkpoint_activations=True)
    again.model.load_state_dict(theirs.model.state_dict())
    for peer in (theirs, again):
        peer.loss(tokens).backward()
    pairs = zip(theirs.trainable(), again.trainable(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-7) for a, b in pairs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_peer_learns(tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("torch")
    spec = small_spec(tmp_path)
    rows = np.load(spec.data)
    np.save(spec.data, np.repeat(rows[:1], 8, axis=0))
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["v_proj", "down_proj"]}
    fast = {**spec.training, "learning_rate": 1e-2}
    spec = dataclasses.replace(spec, dtype=dtype, training=fast)
    command_line = worker_command(sys.executable, "tinyllama.bench.worker_torch")
    for adapters in (None, lora):
        peer_spec = dataclasses.replace(spec, lora=adapters)
        worker = race({"peer": command_line}, {"peer": peer_spec}, 4)[0]
        assert worker.answers[-1].loss < worker.answers[0].loss - 0.01
    assert worker.ready["trainable"] == 2 * 4 * (64 + 32 + 96 + 64)
