"""The operations of one training step, with their sizes and FLOPs; what `--ops` times.

A product is named by its layout: x W^T forward, dy W for the inputs' gradient, dy^T x for the
weights'. The others are timed as a whole, "both" meaning forward and backward.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from tinyllama.bench.flops import linear_shapes
from tinyllama.config import LlamaConfig

LAYOUTS = {"NT": "x W^T", "NN": "dy W", "TN": "dy^T x"}
SECONDS_EACH = 0.4


@dataclasses.dataclass(frozen=True)
class Operation:
    """What to run: a kind, the sizes its kind needs, and what that costs."""

    kind: str
    sizes: dict[str, int]
    flops: int

    @property
    def label(self) -> str:
        kind, *layout = self.kind.split(" ")
        name = f"matmul {LAYOUTS[layout[0]]}" if kind == "matmul" else self.kind
        return f"{name} {' x '.join(str(size) for size in self.sizes.values())}"


def operations(config: LlamaConfig, batch: int, context: int) -> list[Operation]:
    """Every operation of a step on `batch` rows of `context` tokens, each size once."""
    tokens, hidden, vocab = batch * context, config.hidden_size, config.vocab_size
    inner, heads = config.intermediate_size, config.num_heads
    shapes = dict.fromkeys([*linear_shapes(config).values(), (vocab, hidden)])
    found = [
        Operation(
            f"matmul {layout}", {"M": tokens, "N": rows, "K": columns}, 2 * tokens * rows * columns
        )
        for layout in LAYOUTS
        for rows, columns in shapes
    ]
    sizes = {"B": batch, "T": context, "H": heads, "KV": config.kv_heads, "D": config.head_dim}
    pairs = 2 * config.head_dim * batch * heads * context * (context + 1)  # of query and key
    found.append(Operation("attention forward", sizes, pairs))
    found.append(Operation("attention both", sizes, 3 * pairs))
    loss = {"N": tokens, "V": vocab, "H": hidden}
    found.append(Operation("cross_entropy both", loss, 6 * tokens * vocab * (hidden + 1)))
    found.append(Operation("rms_norm both", {"N": tokens, "H": hidden}, 14 * tokens * hidden))
    found.append(Operation("swiglu both", {"N": tokens, "I": inner}, 23 * tokens * inner))
    found.append(Operation("adamw", {"N": inner, "H": hidden}, 12 * inner * hidden))
    return found


def best_seconds(run: Callable[[], Any]) -> float:
    """The shortest of several runs: two to warm up, then as many as fit SECONDS_EACH (3 or more)."""
    run()
    run()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begun < SECONDS_EACH:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
