"""The learning rate, a pure function of the step."""

import math

from tinyllama.config import LRScheduleConfig


def learning_rate(step: int, total_steps: int, peak: float, schedule: LRScheduleConfig) -> float:
    """Rate of optimizer step 1, 2, ... total_steps: linear warm-up, then down to min_lr.

    cosine: min_lr + (peak - min_lr) (1 + cos(pi r)) / 2 with r from 0 at the end of the warm-up
    to 1 at the last step (Loshchilov & Hutter 2017); linear: straight; constant: the peak.
    """
    if step < schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.type == "constant":
        return peak
    span = max(1, total_steps - max(1, schedule.warmup_steps))
    r = min(1.0, max(0.0, (step - max(1, schedule.warmup_steps)) / span))
    share = (1 + math.cos(math.pi * r)) / 2 if schedule.type == "cosine" else 1 - r
    return schedule.min_lr + (peak - schedule.min_lr) * share
