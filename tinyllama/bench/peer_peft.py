"""The peer of a LoRA run: transformers' LlamaForCausalLM with peft's adapters, as commonly used.

The base is random, since a weight's value does not change what a product costs. Below float32 it
is held in the narrow type, which is what loading a checkpoint for fine-tuning does; peft keeps
its adapters in float32.
"""

from typing import Any, Self

import peft
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F


class PeftLlama:
    """The adapted model with the same members as PeerLlama."""

    beside = f", transformers {transformers.__version__}, peft {peft.__version__}"

    def __init__(
        self,
        model: dict[str, Any],
        lora: dict[str, Any],
        dtype: str,
        seed: int,
        *,
        checkpoint_activations: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**model, use_cache=False)
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        adapters = peft.LoraConfig(
            r=lora["rank"],
            lora_alpha=lora["alpha"],
            lora_dropout=lora["dropout"],
            target_modules=list(lora["target_modules"]),
            use_rslora=bool(lora.get("use_rslora")),
            task_type="CAUSAL_LM",
        )
        if checkpoint_activations:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = peft.get_peft_model(base, adapters).train()

    def to(self, device: str) -> Self:
        """The same model on another PyTorch device."""
        self.model.to(device)
        return self

    def trainable(self) -> list[Tensor]:
        return [tensor for tensor in self.model.parameters() if tensor.requires_grad]

    def base_parameters(self) -> int:
        return sum(t.numel() for t in self.model.parameters() if not t.requires_grad)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross entropy of predicting tokens[:, 1:] from tokens[:, :-1]; float32."""
        logits = self.model(input_ids=tokens[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
