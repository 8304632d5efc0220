"""What a training step is on every backend: docs/BACKENDS.md and docs/backends.json.

Each row is measured in a process of its own, since a process has one device:

    run        two steps of the demo's model, with random weights, on the backend itself
    emulated   counted; the kernels' texts run on the processor in the tests (tests/ops/gpu)
    compiled   counted, and every kernel compiled for the card, which is not needed

`python -m tinyllama.reports.backends ROW` prints one row as JSON.
"""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from tinyllama.config import Config, config_from_toml
from tinyllama.config.presets import find_config
from tinyllama.errors import DeviceError, TrainingError
from tinyllama.model.counts import gigabytes, model_flops
from tinyllama.system import device

Checked = Literal["run", "emulated", "compiled"]
Form = Literal["full", "lora", "qlora"]
FORMS: dict[Form, tuple[str, ...]] = {
    "full": (),
    "lora": ("lora.rank=16",),
    "qlora": ("lora.rank=16", "qlora.block_size=64"),
}
_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Row:
    """What is measured: tinygrad's name of the device, and the step."""

    backend: str
    target: str  # DEV=
    checked: Checked
    config: str = "124m"
    form: Form = "full"
    dtype: str = "float32"
    micro_batch: int = 8
    context_length: int = 1024

    def configuration(self) -> Config:
        overrides = (
            f"training.dtype={self.dtype}",
            f"training.batch_size={self.micro_batch}",
            f"data.context_length={self.context_length}",
            *FORMS[self.form],
        )
        text = find_config(self.config).read_text(encoding="utf-8")
        return config_from_toml(text, self.config, overrides)


def rows() -> list[Row]:
    """Every backend; NVIDIA's always with 124m, 8 x 1024, in float32 and bfloat16."""
    small: dict[str, Any] = {"config": "demo", "micro_batch": 2, "context_length": 256}
    listed = [
        Row("CPU", "CPU", "run", **small),
        Row("OpenCL", "CL", "run", **small),
        Row("Metal", "NULL::metal", "emulated"),
        Row("Metal", "NULL::metal", "emulated", dtype="bfloat16"),
    ]
    for arch in ("sm_80", "sm_90"):
        for form in FORMS:
            for dtype in ("float32", "bfloat16"):
                target = f"NULL:CUDA:{arch}"
                listed.append(Row(f"CUDA {arch}", target, "compiled", form=form, dtype=dtype))
    return listed


def measured(row: Row) -> dict[str, Any]:
    """The row's figures, in this process, whose device is the row's."""
    from tinygrad import Tensor, dtypes

    from tinyllama.train.memory_estimate import blank_step, estimate_memory

    device.select()
    config = row.configuration()
    step = blank_step(config)
    shape = (row.micro_batch, row.context_length)
    batch = [Tensor.empty(*shape, dtype=dtypes.int32) for _ in range(3)]
    numbers = Tensor.empty(step.hyperparameter_count)
    found = step.account(*batch, hyperparameters=numbers, compiling=True)
    model = model_flops(config.model, math.prod(shape), row.context_length, config.lora)
    memory = estimate_memory(config).tensors
    compiled = found.compiled
    if row.checked == "run":
        _run(config, shape)
    return {
        "backend": row.backend,
        "form": row.form,
        "dtype": row.dtype,
        "kernels_per_step": found.kernels,
        "config": row.config,
        "micro_batch": row.micro_batch,
        "context_length": row.context_length,
        "flops_ratio": round(found.flops / model, 4),
        "bytes_per_step": found.nbytes,
        "tensor_core_share": round(found.tensor_core_share, 4),
        "spilled_bytes": compiled and compiled.spilled_bytes,
        "checked": row.checked,
        "_memory": memory,
        "_compiled": compiled and dataclasses.asdict(compiled),
    }


def _run(config: Config, shape: tuple[int, int]) -> None:
    """Two steps on random tokens. Raises TrainingError if the loss does not fall."""
    import numpy as np

    from tinyllama.data.batches import Batch
    from tinyllama.model.build import build_random
    from tinyllama.train.optimizer import AdamW, weights_to_copy
    from tinyllama.train.step import TrainStep

    model, trained, _ = build_random(config, 0)
    optimizer = AdamW(trained, config.training, copied=weights_to_copy(model, trained))
    step = TrainStep(model, optimizer, 1)
    random = np.random.default_rng(0)
    tokens = random.integers(0, config.model.vocab_size, shape).astype(np.int32)
    batch = Batch(tokens, np.roll(tokens, -1, 1), np.zeros_like(tokens))
    losses = [step([batch], n, config.training.learning_rate).loss for n in range(1, _STEPS + 1)]
    if not losses[-1] < losses[0]:
        raise TrainingError(f"the loss does not fall on {device.select().device}: {losses}")


def write(folder: Path, show: Callable[[str], None]) -> None:
    """Measure every row and write BACKENDS.md and backends.json into `folder`.

    A backend that does not work here is left out; `show` is called with a line that says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for row in rows():
        show(f"{row.backend} {row.form} {row.dtype} {row.config}: {row.checked}")
        try:
            found.append(_in_a_process(row))
        except DeviceError as error:
            show(f"left out: {error}")
    (folder / "BACKENDS.md").write_text(document(found), encoding="utf-8")
    public = [{k: v for k, v in row.items() if not k.startswith("_")} for row in found]
    (folder / "backends.json").write_text(json.dumps(public, indent=1) + "\n", encoding="utf-8")


def _in_a_process(row: Row) -> dict[str, Any]:
    """Raises DeviceError where the row's process says that its device cannot be used."""
    done = subprocess.run(
        [sys.executable, "-m", "tinyllama.reports.backends", json.dumps(dataclasses.asdict(row))],
        capture_output=True,
        text=True,
        env=device.environment_of(row.target),
    )
    last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    if done.returncode == _NO_DEVICE:
        raise DeviceError(last)
    if done.returncode:
        raise TrainingError(f"{row.backend}: {last}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


_NO_DEVICE = 2

_HEAD = """# What a training step is on every backend

Written by `tinyllama backends --report docs` (`make backends-report`); the same as numbers is in
[backends.json](backends.json). `kernels` are launches per step. `FLOPs` are those that the kernels
do, divided by the model's ([accounting.md](accounting.md)). `GB` are bytes that a step moves: for
each launch the different bytes of its buffers, summed. `tensor cores` is the part of all products'
FLOPs that runs on them. `spilled` are bytes per thread that found no register, `shared` is the most
shared memory per block, 1 KB of it reserved by the card on sm_90. `memory` is that of all tensors,
as `tools/memory.py` estimates it; `compile` the seconds of processor time that compiling every
kernel took on the machine that wrote this, without a cache: cores share them.

- **run**: the step ran on the backend, two steps of the demo's model, and the loss fell.
- **emulated**: the same texts ran on the processor, with the card's lanes and barriers emulated.
- **compiled**: every kernel of the step compiled for the card; none ran.

"""


def document(found: list[dict[str, Any]]) -> str:
    """BACKENDS.md."""
    heads = (
        "backend", "form", "dtype", "model", "kernels", "FLOPs", "GB", "tensor cores",
        "spilled", "shared", "memory", "compile", "checked",
    )  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in found]
    return _HEAD + "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    compiled = row["_compiled"]
    return [
        row["backend"],
        row["form"],
        row["dtype"],
        f"{row['config']}, {row['micro_batch']} x {row['context_length']}",
        f"{row['kernels_per_step']:,}",
        f"{row['flops_ratio']:.3f}",
        f"{row['bytes_per_step'] / 1e9:.1f}",
        f"{100 * row['tensor_core_share']:.1f} %" if compiled else "",
        f"{compiled['spilled_bytes']}" if compiled else "",
        f"{compiled['shared_bytes'] / 1024:.0f} KB" if compiled else "",
        gigabytes(row["_memory"]),
        f"{compiled['seconds']:.0f} s" if compiled else "",
        row["checked"],
    ]


def main(words: list[str]) -> int:
    """Print the row that is given as JSON."""
    try:
        print(json.dumps(measured(Row(**json.loads(words[0])))))
    except DeviceError as error:
        print(error, file=sys.stderr)
        return _NO_DEVICE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
