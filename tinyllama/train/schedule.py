"""How many steps a run has, and the learning rate of each.

Both follow from the place in the data, so that a run may go on with another batch size: the
windows that are left decide the steps that are left, and the rate goes on from where it was.
"""

import math
from dataclasses import dataclass, replace

from tinyllama.config import LRScheduleConfig


@dataclass(frozen=True)
class Anchor:
    """A point on the way from the peak down to min_lr: after `step`, `share` of it was done."""

    step: int
    share: float


def learning_rate(
    step: int,
    total_steps: int,
    peak: float,
    schedule: LRScheduleConfig,
    anchor: Anchor | None = None,
) -> float:
    """Rate of optimizer step 1, 2, ... total_steps: linear warm-up, then down to min_lr.

    cosine: min_lr + (peak - min_lr) (1 + cos(pi r)) / 2 with r from 0 at the end of the warm-up,
    or from the anchor's share, to 1 at the last step (Loshchilov & Hutter 2017); linear: straight;
    constant: the peak; wsd: the peak, then straight over the last decay_fraction of this way
    (warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395).
    """
    if step < schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.type == "constant":
        return peak
    r = share_done(step, total_steps, schedule, anchor)
    if schedule.type == "cosine":
        height = (1 + math.cos(math.pi * r)) / 2
    elif schedule.type == "wsd":
        height = min(1.0, (1 - r) / schedule.decay_fraction)
    else:
        height = 1 - r
    return schedule.min_lr + (peak - schedule.min_lr) * height


def with_warmup_steps(
    schedule: LRScheduleConfig, total_steps: int, saved: int | None = None
) -> LRScheduleConfig:
    """The schedule with warmup_steps in place of warmup_ratio, for a run of so many steps.

    `saved` are those of the checkpoint that is resumed: with another batch size the run has other
    steps, and the warm-up goes on as it began.
    """
    if not schedule.warmup_ratio:
        return schedule
    steps = math.ceil(schedule.warmup_ratio * total_steps) if saved is None else saved
    return replace(schedule, warmup_steps=steps, warmup_ratio=0.0)


def share_done(
    step: int, total_steps: int, schedule: LRScheduleConfig, anchor: Anchor | None = None
) -> float:
    """How much of the way down to min_lr is done at a step, 0 to 1."""
    begin = anchor or Anchor(max(1, schedule.warmup_steps), 0.0)
    span = max(1, total_steps - begin.step)
    way = min(1.0, max(0.0, (step - begin.step) / span))
    return begin.share + (1 - begin.share) * way


@dataclass(frozen=True)
class Place:
    """Where a run stands: `step` steps done, and `window` of n_windows in the epoch `epoch` (from
    0), of num_epochs; it ends after max_steps steps in any case."""

    step: int
    epoch: int
    window: int
    n_windows: int
    num_epochs: int
    max_steps: int | None

    def total_steps(self, batch_size: int) -> int:
        """Steps of the whole run: those done, and those left with this batch size.

        A batch does not reach over the end of an epoch.
        """
        epochs_after = self.num_epochs - self.epoch - 1
        left = 0
        if epochs_after >= 0:
            left = -(-(self.n_windows - self.window) // batch_size)
            left += epochs_after * -(-self.n_windows // batch_size)
        total = self.step + left
        return total if self.max_steps is None else min(total, self.max_steps)

    def anchor(
        self, batch_size: int, schedule: LRScheduleConfig, saved: Anchor | None
    ) -> Anchor | None:
        """From where the rate goes on after a run with `batch_size`, whose anchor was `saved`.

        None while the warm-up lasts: the way down begins after it.
        """
        if self.step < schedule.warmup_steps:
            return None
        share = share_done(self.step, self.total_steps(batch_size), schedule, saved)
        return Anchor(self.step, share)
