"""Whether a run fits its device's memory, and the largest micro-batch that does."""

import bisect
import math
from dataclasses import replace
from typing import NamedTuple

from tinygrad import Device

from tinyllama.config import Config
from tinyllama.errors import ConfigError
from tinyllama.model.counts import gigabytes, parameters
from tinyllama.system import memory
from tinyllama.train.memory_estimate import MemoryEstimate, blank_step, estimate_memory
from tinyllama.train.step import TrainStep


def largest_micro_batch(config: Config, limit_bytes: int) -> int | None:
    """The largest micro_batch_size whose estimate is within the limit, or None.

    Only divisors of batch_size are tried, as only they can be set.
    """
    # A whole batch needs no sums of gradients, so it may fit where half of it does not.
    size = config.training.batch_size
    return size if _fits(config, size, limit_bytes) else _largest_part(config, limit_bytes)


def _largest_part(config: Config, limit_bytes: int) -> int | None:
    """The largest micro_batch_size below batch_size that is within the limit, or None."""
    size = config.training.batch_size
    divisors = _divisors(size)[:-1]
    count = bisect.bisect_left(divisors, True, key=lambda n: not _fits(config, n, limit_bytes))
    return divisors[count - 1] if count else None


def _fits(config: Config, size: int, limit_bytes: int) -> bool:
    parts = _in_parts(config, size)
    if _least_bytes(parts) > limit_bytes:
        return False
    # Copies of weights are worth no smaller micro-batch.
    return estimate_memory(parts, copies=False).total <= limit_bytes


def _least_bytes(config: Config) -> int:
    """A lower bound of what a micro-batch takes: its hidden states of one layer, in 16 bits."""
    return 2 * config.training.micro_batch * config.context_length * config.model.hidden_size


def _plannable(config: Config, limit_bytes: int) -> Config:
    """The configuration with a micro-batch small enough to be planned in a short time.

    Raises ConfigError where weights packed in 4 bits, the tokens of a batch or, if it is set, a
    micro-batch are larger than the memory.
    """
    t, where, weights = config.training, config.where, parameters(config.model).total
    sizes = [1] if t.micro_batch_size else _divisors(t.batch_size)
    able = [n for n in sizes if _least_bytes(_in_parts(config, n)) <= limit_bytes]
    there = f"{Device.DEFAULT} has {gigabytes(limit_bytes)} free"
    if weights // 2 > limit_bytes:
        raise ConfigError(f"does not fit: the model has {weights:,} parameters, and {there}")
    if 12 * t.batch_size * config.context_length > limit_bytes or not able:
        tokens = f"{t.batch_size} x {config.context_length} tokens"
        raise ConfigError(f"{where('training.batch_size')}: {tokens} do not fit: {there}")
    if t.micro_batch_size and _least_bytes(config) > limit_bytes:
        tokens = f"{t.micro_batch_size} x {config.context_length} tokens"
        raise ConfigError(f"{where('training.micro_batch_size')}: {tokens} do not fit: {there}")
    return config if t.micro_batch_size or able[-1] == t.batch_size else _in_parts(config, able[-1])


def _divisors(size: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(size) + 1) if size % n == 0]
    return sorted({*small, *(size // n for n in small)})


def _in_parts(config: Config, size: int) -> Config:
    return replace(config, training=replace(config.training, micro_batch_size=size))


def verdict(config: Config, estimate: MemoryEstimate, limit_bytes: int | None) -> str:
    """One line: whether a run fits, and the largest micro-batch that does."""
    if limit_bytes is None:
        return f"the memory of {Device.DEFAULT} is not known"
    largest = largest_micro_batch(config, limit_bytes)
    most = f"the largest micro-batch that does is {largest}"
    if largest is None:
        most = "not even a micro-batch of 1 does"
    there = gigabytes(limit_bytes)
    if estimate.total <= limit_bytes:
        return f"fits the {there} that {Device.DEFAULT} has free; {most}"
    needed = gigabytes(estimate.total)
    return f"does not fit: needs {needed}, and {Device.DEFAULT} has {there} free; {most}"


def planned_step(config: Config, limit_bytes: int | None) -> tuple[TrainStep, MemoryEstimate]:
    """A run's step and its estimate, with copies of weights if they fit. Where nobody knows the
    memory, a GPU has them: its forward pass saves less instead."""
    step = blank_step(config)
    estimate = estimate_memory(config, step)
    fits = estimate.total <= limit_bytes if limit_bytes is not None else Device.DEFAULT != "CPU"
    if fits or not step.optimizer.copies:
        return step, estimate
    step = blank_step(config, copies=False)
    return step, estimate_memory(config, step)


class PlannedRun(NamedTuple):
    """A run that fits its device: its configuration, the planned step, and a report in words."""

    config: Config
    step: TrainStep
    report: str


def plan_run(config: Config, *, force: bool = False) -> PlannedRun:
    """Estimate a run; where no micro_batch_size is set, choose the largest that fits the device.

    Raises ConfigError if it cannot fit; with `force`, or where the device's memory is not known,
    the report only says so. The step's pieces can be taken over by the run.
    """
    limit = memory.free_bytes()
    t, chosen = config.training, ""
    if limit is not None and not force:
        config = _plannable(config, limit)
    step, estimate = planned_step(config, limit)
    if limit is not None and estimate.total > limit and t.micro_batch_size is None:
        part = _largest_part(config, limit)
        if part is not None:
            config = _in_parts(config, part)
            step, estimate = planned_step(config, limit)
    if config.training.micro_batch_size != t.micro_batch_size:
        part = config.training.micro_batch
        chosen = f"; training.micro_batch_size is not set: {part} of {t.batch_size} at a time"
    if limit is not None and estimate.total <= limit:
        room = f"fits: {gigabytes(estimate.total)} of {gigabytes(limit)} free{chosen}"
        return PlannedRun(config, step, f"{estimate.table()}\n{room}")
    text = f"{estimate.table()}\n{verdict(config, estimate, limit)}"
    if limit is None or force:
        return PlannedRun(config, step, text)
    raise ConfigError(
        f"{text}\nlower training.micro_batch_size or data.context_length, "
        "set training.checkpoint_activations = true, or try it nevertheless with --force"
    )
