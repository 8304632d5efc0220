"""One operation of a training step, with its sizes and FLOPs: what `--ops` times.

A product is named by its layout: x W^T forward, dy W for the inputs' gradient, dy^T x for the
weights'. The others are timed as a whole, "both" meaning forward and backward.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

LAYOUTS = {"NT": "x W^T", "NN": "dy W", "TN": "dy^T x"}
SECONDS_EACH = 0.4


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation: its kind, the sizes that the kind needs, and its FLOPs."""

    kind: str
    sizes: dict[str, int]
    flops: int

    @property
    def label(self) -> str:
        kind, *layout = self.kind.split(" ")
        name = f"matmul {LAYOUTS[layout[0]]}" if kind == "matmul" else self.kind
        return f"{name} {' x '.join(str(size) for size in self.sizes.values())}"


def best_seconds(run: Callable[[], Any]) -> float:
    """The shortest of as many runs as fit SECONDS_EACH (at least 3), after two to warm up."""
    run()
    run()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begun < SECONDS_EACH:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
