"""Our worker process: the trainer's own step, one per request.

Weights are random, also those of a frozen base (packed into 4 bits for QLoRA): their values do
not change what a step costs.
"""

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyllama.bench.protocol import (
    Contender,
    Spec,
    Step,
    serve,
)
from tinyllama.config import config_from_toml
from tinyllama.data.batches import Batch
from tinyllama.model.counts import parameters
from tinyllama.system import device
from tinyllama.system.memory import collect_seldom, memory_in_use_bytes, return_freed_arrays


class OurContender:
    """The model, optimizer and step that `python -m tinyllama.train` would use."""

    def __init__(self, spec: Spec) -> None:
        self.choice = device.select()
        device.set_threads(spec.threads)
        from tinyllama.model.build import build_random
        from tinyllama.model.lora import dropping
        from tinyllama.train.optimizer import AdamW, weights_to_copy
        from tinyllama.train.step import TrainStep

        self.config = config_from_toml(spec.config, "benchmark", [f"training.dtype={spec.dtype}"])
        self.packed = self.config.qlora is not None and self.config.qlora.quantize_base
        model, trained, _ = build_random(self.config, spec.seed)
        copied = weights_to_copy(model, trained)
        self.optimizer = AdamW(trained, self.config.training, copied=copied)
        self.train = TrainStep(model, self.optimizer, 1, dropping(model, spec.seed))
        self.done = 0

    def describe(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {
            "library": f"tinyllama on tinygrad {version('tinygrad')}{', int4' * self.packed}",
            "device": self.choice.device,
            "device_name": self.choice.description,
            "threads": device.threads(),
            "parameters": parameters(self.config.model).total,
            "trainable": sum(t.numel() for t in self.optimizer.parameters.values()),
        }

    def step(self, tokens: NDArray[np.int32]) -> Step:
        from tinygrad.helpers import GlobalCounters

        inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        batch = Batch(inputs, targets, np.zeros_like(inputs))  # each row is one document
        GlobalCounters.reset()
        self.done += 1
        result = self.train([batch], self.done, self.config.training.learning_rate)
        in_use = None if self.choice.device == "CPU" else memory_in_use_bytes()
        return Step(result.loss, self.kernels(), GlobalCounters.global_ops, in_use)

    def kernels(self) -> int:
        """Kernels launched per step; tinygrad's own counter counts a graph of many as one."""
        from tinyllama.runtime.capture import kernel_count

        return kernel_count(self.train._whole)


def build(spec: Spec) -> Contender:
    """Our trainer, ready. Raises DeviceError or ConfigError."""
    return OurContender(spec)


if __name__ == "__main__":
    collect_seldom()  # as the command line does
    return_freed_arrays()
    sys.exit(serve(build))
