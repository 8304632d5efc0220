"""What recording the kernels of a step costs: the same step with and without, in turns.

    .venv/bin/python tools/profile_overhead.py [CONFIG] [--set SECTION.KEY=VALUE] --steps 30

Times are of the process's processor, on one thread, so that other programs matter little. Prints
the medians, their ratio, and that the losses of both are the same bits.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama.system import device

WARM_UP = 3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", default="demo")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    device.select()
    device.set_threads(1)
    from tinyllama.config import load_config
    from tinyllama.runtime.recording import recording

    config = load_config(options.config, options.set)
    with recording() as recorder:
        timed = contender(config)
        result_timed = [timed(n) for n in range(1, WARM_UP + 1)]
    plain = contender(config)
    result_plain = [plain(n) for n in range(1, WARM_UP + 1)]
    seconds: dict[str, list[float]] = {"plain": [], "timed": []}
    for n in range(WARM_UP + 1, WARM_UP + 1 + options.steps):
        for name, step in (("plain", plain), ("timed", timed)):
            recorder.take()
            begun = time.process_time()
            result = step(n)
            if name == "timed":
                recorder.take()
            seconds[name].append(time.process_time() - begun)
            (result_timed if name == "timed" else result_plain).append(result)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["timed"] / medians["plain"] - 1
    print(
        f"plain {1e3 * medians['plain']:.2f} ms, recorded {1e3 * medians['timed']:.2f} ms", end=""
    )
    same = "the same" if result_timed == result_plain else "NOT the same"
    print(f": {ratio:+.1%} of processor time; losses {same}")


def contender(config: Any) -> Any:
    """A model, optimizer and step; `run(n)` makes step n on the same random tokens for all."""
    import numpy as np

    from tinyllama.data.batches import Batch
    from tinyllama.model.build import build_random
    from tinyllama.train.optimizer import AdamW
    from tinyllama.train.step import TrainStep

    t = config.training
    model, trained, _ = build_random(config, t.seed)
    train = TrainStep(model, AdamW(trained, t), 1)

    def run(n: int) -> Any:
        generator = np.random.default_rng(n)
        size = (t.batch_size, config.context_length + 1)
        rows = generator.integers(0, config.model.vocab_size, size, np.int32)
        tokens, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
        return train([Batch(tokens, targets, np.zeros_like(tokens))], n, t.learning_rate)

    return run


if __name__ == "__main__":
    main()
