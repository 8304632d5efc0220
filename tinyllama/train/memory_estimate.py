"""How much memory a run will need, before it starts.

    weights + copies of weights + scales + adapters + gradients + optimizer state + activations
      + workspace - what is reused within a step + the interpreter and its libraries = total

The model, the optimizer and the step are the run's own, with tensors that hold no memory yet;
the step is captured without being run and its memory planned (runtime/plan.py), so that every
number but the last is the one tinygrad will allocate.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain

from tinygrad import Device, Tensor
from tinygrad.helpers import GlobalCounters

from tinyllama.config import Config
from tinyllama.data.layout import trimmed_lengths
from tinyllama.model.build import build_blank
from tinyllama.model.counts import (
    Parameters,
    aligned,
    gigabytes,
    parameters_of,
)
from tinyllama.model.layers import named_tensors
from tinyllama.model.llama import Llama
from tinyllama.model.lora import dropout_on
from tinyllama.runtime.plan import plan
from tinyllama.system import memory
from tinyllama.train.gradients import StagedLoss
from tinyllama.train.objective import blank_batch, validation_loss
from tinyllama.train.optimizer import AdamW, weights_to_copy
from tinyllama.train.preferences import loss_of
from tinyllama.train.step import TrainStep

# What the graphs of a run add to the memory of a process, besides tensors: 17 to 29 MB were
# measured with 4 and 6 layers, 62 MB with 32 (Linux, Python 3.11, tinygrad 0.13).
GRAPH_BYTES = 17_000_000
GRAPH_BYTES_PER_LAYER = 1_400_000

_LABELS = {
    "weights": "weights",
    "copies": "copies of weights in 16 bits",
    "scales": "scales of packed weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "activations": "activations",
    "workspace": "workspace",
    "reused": "reused within a step",
    "runtime": "interpreter, libraries, graphs",
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training holds at its peak, by purpose; `reused` is negative.

    Activations, gradients and workspace are each given at their own peak. These peaks are at
    different times: activations are freed while gradients appear, and `reused` is what that saves.
    """

    weights: int
    copies: int
    scales: int
    adapters: int
    gradients: int
    optimizer_state: int
    activations: int
    workspace: int
    reused: int
    runtime: int
    micro_batch_size: int
    context_length: int

    @property
    def tensors(self) -> int:
        """Bytes of tensors: the peak of tinygrad's own counter."""
        return self.total - self.runtime

    @property
    def total(self) -> int:
        """Bytes that the device must have; on a CPU, the resident memory of the process."""
        return sum(getattr(self, name) for name in _LABELS)

    def table(self) -> str:
        """One line for each purpose and their sum, as text."""
        rows = [(_LABELS[name], getattr(self, name)) for name in _LABELS]
        lines = [{"memory": label, "bytes": f"{n:,}", "": gigabytes(n)} for label, n in rows if n]
        lines.append({"memory": "total", "bytes": f"{self.total:,}", "": gigabytes(self.total)})
        return aligned(lines)

    def as_dict(self) -> dict[str, int]:
        """Every number by name, and the two sums."""
        return asdict(self) | {"tensors": self.tensors, "total": self.total}


def model_parameters(config: Config) -> Parameters:
    """The parameters of the model that a configuration trains, counted by walking it.

    A packed weight counts as the numbers it stands for.
    """
    model = build_blank(replace(config, qlora=None)).model
    counts = ((name, tensor.numel()) for name, tensor in named_tensors(model))
    return parameters_of((name, n) for name, n in counts if not name.endswith("_key"))


def blank_step(config: Config, *, copies: bool = True) -> TrainStep:
    """The training step of a configuration; model and optimizer hold no memory yet. Weights have
    `copies` where those make a step faster (ops/copies.py)."""
    model, trained, _ = build_blank(config)
    copied = weights_to_copy(model, trained) if copies else []
    optimizer = AdamW(trained, config.training, copied=copied, blank=True)
    steps, guarded = config.training.accumulation_steps, config.observe.guards_updates
    return TrainStep(model, optimizer, steps, loss=loss_of(config), guarded=guarded)


def estimate_memory(
    config: Config, step: TrainStep | None = None, *, copies: bool = True
) -> MemoryEstimate:
    """What training with this configuration holds on the selected device, at its peak.

    A base checkpoint's sizes must be in the configuration already (`Config.with_base`). `step` is
    a `blank_step` to plan with, whose pieces the run can take over then; without one, `copies` says
    whether weights have copies where those make a step faster.
    """
    t, context, runtime = config.training, config.context_length, _runtime_bytes(config)
    step = step or blank_step(config, copies=copies)
    model, optimizer = step.staged.model, step.optimizer
    batch, shorter = blank_batch(config), []
    if not config.data.pack:
        shorter = [blank_batch(config, length) for length in trimmed_lengths(context)[:-1]]
    hyperparameters = Tensor.empty(step.hyperparameter_count)
    with dropout_on(model), model.noise.on() if model.noise else nullcontext():
        # As in training, and not in validation.
        plans = step.plans(*batch, hyperparameters=hyperparameters)
        for rows in shorter:  # a graph each, with memory of its own
            plans.append(step.plans(*rows, hyperparameters=hyperparameters)[0])
    first = plans[0]
    if config.data.validates:
        loss = validation_loss(config)
        validated = batch if loss.measures else batch[:3]
        plans.append(plan(StagedLoss(model, loss=loss).loss, validated))
    gradients = first.gradients + _bytes(step.sums())
    given = _bytes([*chain(batch, *shorter), hyperparameters, *model.rotations(context)])
    workspace = given + sum(p.work for p in plans)
    held = given + _bytes(step.sums()) + sum(p.arena for p in plans)
    return MemoryEstimate(
        **_lasting(model, optimizer),
        gradients=gradients,
        activations=first.kept,
        workspace=workspace,
        reused=held - gradients - first.kept - workspace,
        runtime=runtime,
        micro_batch_size=t.micro_batch,
        context_length=context,
    )


def lasting_bytes(config: Config) -> dict[str, int]:
    """Bytes of the tensors that last for a whole run, by purpose, as in MemoryEstimate."""
    step = blank_step(config)
    return _lasting(step.staged.model, step.optimizer)


def _lasting(model: Llama, optimizer: AdamW) -> dict[str, int]:
    sizes = {"weights": 0, "copies": _bytes(optimizer.copies.values())}
    sizes |= {"scales": 0, "adapters": 0}
    for name, tensor in named_tensors(model):
        sizes[_purpose(name)] += tensor.nbytes()
    return sizes | {"optimizer_state": _bytes(optimizer.state_dict().values())}


def _purpose(name: str) -> str:
    """The purpose under which a tensor of the model is counted."""
    if "lora_" in name:
        return "adapters"
    return "scales" if name.endswith(("scales", "minima")) else "weights"


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes() for tensor in tensors)


def _runtime_bytes(config: Config) -> int:
    """Resident memory besides tensors: what this process has now, and the graphs of a run.

    It is measured, since drivers that were loaded while looking for devices make a difference of
    50 MB. On devices other than the CPU it is not in the device's memory, so it is 0.
    """
    if Device.DEFAULT != "CPU":
        return 0
    now = memory.resident_bytes() - int(GlobalCounters.mem_used_per_device["CPU"])
    return max(now, 0) + GRAPH_BYTES + GRAPH_BYTES_PER_LAYER * config.model.num_layers
