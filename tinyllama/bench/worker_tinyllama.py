"""Our worker process: the trainer's own step, one a request.

Weights are random, also those of a frozen base and, packed into 4 bits, of a QLoRA run's: their
values do not change what a step costs.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tinyllama.bench.protocol import (
    Contender,
    Spec,
    Step,
    serve,
)
from tinyllama.config import Config, LoraConfig, config_from_toml
from tinyllama.data.batches import Batch
from tinyllama.formats.huggingface import llama_shapes
from tinyllama.model.counts import parameters
from tinyllama.system import device
from tinyllama.system.memory import collect_seldom, memory_in_use_bytes

if TYPE_CHECKING:
    from tinygrad.dtype import DType

    from tinyllama.model.llama import Llama


class OurContender:
    """The model, optimizer and step that `python -m tinyllama.train` would use."""

    def __init__(self, spec: Spec) -> None:
        self.choice = device.select()
        device.set_threads(spec.threads)
        from tinygrad import dtypes

        from tinyllama.model import lora
        from tinyllama.model.llama import Llama
        from tinyllama.train.optimizer import AdamW
        from tinyllama.train.step import TrainStep

        self.config = config_from_toml(spec.config, "benchmark")
        training = self.config.training
        dtype = getattr(dtypes, spec.dtype)
        self.packed = self.config.qlora is not None and self.config.qlora.quantize_base
        if self.packed:
            self.model = packed_model(self.config, dtype, spec.seed)
        else:
            self.model = Llama(self.config.model, dtype=dtype, seed=spec.seed, background=True)
        self.model.checkpoint_activations = training.checkpoint_activations
        trained = self.model.state_dict()
        if self.config.lora is not None:
            attach_adapters(self.model, self.config.lora, spec.seed)
            trained = lora.adapter_tensors(self.model)
        self.optimizer = AdamW(trained, training)
        dropping = lora.dropping(self.model, spec.seed)
        self.train = TrainStep(self.model, self.optimizer, 1, dropping)
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
        held = None if self.choice.device == "CPU" else memory_in_use_bytes()
        return Step(result.loss, self.kernels(), GlobalCounters.global_ops, held)

    def kernels(self) -> int:
        """Kernels one step launches; tinygrad's own counter takes a graph of many for one."""
        from tinyllama.runtime.capture import kernel_count

        return kernel_count(self.train._whole)


def packed_model(config: Config, dtype: "DType", seed: int) -> "Llama":
    """A new model whose linear layers are packed as its weights are made, one at a time."""
    from tinyllama.model import int4
    from tinyllama.model.initialize import first_values
    from tinyllama.model.llama import Llama

    assert config.qlora is not None
    sizes, shapes = config.model, llama_shapes(config.model)
    model = int4.packed_linears(Llama(sizes, dtype=dtype, seed=None), config.qlora.block_size)
    with ThreadPoolExecutor(device.threads()) as pool:

        def read(name: str) -> "int4.Rows":
            values = first_values(name, shapes[name], sizes.num_layers, seed, pool)
            return values.__getitem__

        int4.fill_packed(model, "random weights", read)
    return model


def attach_adapters(model: "Llama", section: LoraConfig, seed: int) -> None:
    """Wrap the layers that a [lora] section names, over any base: its weights cost the same."""
    from tinyllama.formats.peft import AdapterConfig, Placement
    from tinyllama.model import lora
    from tinyllama.model.layers import block_linears

    paths = (path for path, _, name in block_linears(model.model.layers) if name in section.modules)
    placed = dict.fromkeys(paths, Placement(section.rank, section.alpha))
    lora.attach(model, AdapterConfig(placed, section.use_rslora, section.dropout), seed)


def build(spec: Spec) -> Contender:
    """Our trainer, ready. Raises DeviceError or ConfigError."""
    return OurContender(spec)


if __name__ == "__main__":
    collect_seldom()  # as the command line does
    sys.exit(serve(build))
