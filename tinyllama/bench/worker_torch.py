"""The peer's worker process: PyTorch trains the model on our device, one step per request.

A whole model is trained in plain PyTorch (peer_torch.py). Adapters are trained by transformers and
peft (peer_peft.py), or where these are not installed by the same formula in plain PyTorch, which is
faster; `library` names which.
"""

import contextlib
import importlib.util
import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tinyllama.bench.protocol import (
    Contender,
    Spec,
    Step,
    serve,
)
from tinyllama.errors import TrainingError

if TYPE_CHECKING:
    from tinyllama.bench.peer_peft import PeftLlama
    from tinyllama.bench.peer_torch import PeerLlama

# PyTorch's name of our device. PyTorch has no OpenCL: its processor's figures are compared then.
TORCH_DEVICE = {"CUDA": "cuda", "NV": "cuda", "AMD": "cuda", "METAL": "mps"}
MISSING = "PyTorch is not installed here: pip install 'tinyllama-trainer[bench]', or --peer-python"


class TorchContender:
    """AdamW over the peer's model, gradients clipped by their norm, autocast below float32."""

    def __init__(self, spec: Spec) -> None:
        import torch

        torch.set_num_threads(spec.threads)
        self.torch, self.spec = torch, spec
        self.device = TORCH_DEVICE.get(spec.device, "cpu")
        self.peer = _model(spec).to(self.device)
        torch.set_default_device(self.device)  # for the tables that the model computes
        self.loss = torch.compile(self.peer.loss) if spec.compile else self.peer.loss
        options = spec.training
        # As in our optimizer, norms do not decay.
        matrices = {"params": [p for p in self.peer.trainable() if p.ndim >= 2]}
        norms = {"params": [p for p in self.peer.trainable() if p.ndim < 2], "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW(
            [group for group in (matrices, norms) if group["params"]],
            lr=options["learning_rate"],
            betas=(options["beta1"], options["beta2"]),
            eps=options["epsilon"],
            weight_decay=options["weight_decay"],
            fused=True,  # the fastest of its three implementations
        )
        self.scaler = torch.amp.GradScaler(self.device, enabled=spec.dtype == "float16")

    def describe(self) -> dict[str, Any]:
        how = "torch.compile" if self.spec.compile else "eager"
        return {
            "library": f"PyTorch {self.torch.__version__} ({how}){self.peer.beside}",
            "device": self.device.upper(),
            "threads": self.torch.get_num_threads(),
            "parameters": self.peer.base_parameters(),
            "trainable": sum(tensor.numel() for tensor in self.peer.trainable()),
        }

    def step(self, tokens: NDArray[np.int32]) -> Step:
        torch, training = self.torch, self.spec.training
        batch = torch.from_numpy(tokens).long().to(self.device)
        context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.spec.dtype != "float32":
            context = torch.autocast(self.device, getattr(torch, self.spec.dtype))
        with context:
            loss = self.loss(batch)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        limit = training["grad_clip"] or math.inf
        torch.nn.utils.clip_grad_norm_(self.peer.trainable(), limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return Step(loss.item(), device_bytes=self._device_bytes())

    def _device_bytes(self) -> int | None:
        """The most that tensors took; None on the processor, where the whole process counts."""
        if self.device == "cuda":
            return int(self.torch.cuda.max_memory_allocated())
        return int(self.torch.mps.driver_allocated_memory()) if self.device == "mps" else None


def _model(spec: Spec) -> "PeerLlama | PeftLlama":
    """The model to train, with random weights."""
    again = bool(spec.training.get("checkpoint_activations"))
    if spec.lora and all(map(importlib.util.find_spec, ("transformers", "peft"))):
        from tinyllama.bench.peer_peft import PeftLlama

        return PeftLlama(spec.model, spec.lora, spec.dtype, spec.seed, checkpoint_activations=again)
    from tinyllama.bench.peer_torch import PeerLlama, random_adapters, random_weights

    adapters = random_adapters(spec.model, spec.lora, spec.seed) if spec.lora else None
    weights = random_weights(spec.model, spec.seed)
    return PeerLlama(spec.model, weights, spec.lora, adapters, checkpoint_activations=again)


def build(spec: Spec) -> Contender:
    """A peer ready to train. Raises TrainingError where PyTorch is missing."""
    try:
        return TorchContender(spec)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise TrainingError(MISSING) from error


if __name__ == "__main__":
    sys.exit(serve(build))
