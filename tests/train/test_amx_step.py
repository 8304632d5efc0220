"""Training steps with AMX's registers in C: products and attention in tiles, as a run has them."""

import json
import subprocess
import sys

import pytest
from runs_helpers import ROOT, environment

from tinyllama.system import processor

MODEL = """
[model]
vocab_size = 300
hidden_size = 128
num_layers = 2
num_heads = 4
num_kv_heads = 2
intermediate_size = 160
max_seq_len = 128
[training]
batch_size = 2
"""
STEPS = f"""
import json, sys
sys.path[:0] = [{str(ROOT / "tests/helpers")!r}]
from tinyllama.system import device
device.select()
if sys.argv[1] == "AMX":
    import amx_in_c
    amx_in_c.install()
import numpy as np
from tinyllama.config import config_from_toml
from tinyllama.data.batches import Batch
from tinyllama.model.build import build_random
from tinyllama.runtime import c_kernel
from tinyllama.train.optimizer import AdamW
from tinyllama.train.step import TrainStep

texts, whole = [], c_kernel.Kernel.text
c_kernel.Kernel.text = lambda kernel: texts.append(whole(kernel)) or texts[-1]
config = config_from_toml(sys.argv[2], "steps")
model, trained, _ = build_random(config, 0)
step = TrainStep(model, AdamW(trained, config.training), 1)
tokens = np.random.default_rng(0).integers(0, 300, (2, 101)).astype(np.int32)
starts = np.zeros_like(tokens)
starts[1, 60:] = 60
batch = Batch(tokens, np.roll(tokens, -1, 1), starts)
results = [step([batch], n, 1e-3) for n in range(1, 5)]
words = ("#define TILE_AMX 1", "#define BF16X3 1", "INLINE void attend_strip")
counts = [sum(word in text for text in texts) for word in words]
print(json.dumps([[(r.loss, r.grad_norm) for r in results], counts]))
"""

pytestmark = pytest.mark.skipif(
    "avx512f" not in processor.described().get("flags", ""), reason="kernels for AMX use AVX-512"
)


def trained(unit: str, options: str) -> tuple[list[list[float]], list[int]]:
    """Loss and norm of four steps; kernels in tiles, of products by parts, of attention."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS, unit, MODEL + options],
        env=environment(NUM_CPU_THREADS="1"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results, counts = json.loads(done.stdout.splitlines()[-1])
    return results, counts


def test_bfloat16_in_tiles_trains_as_without_them_and_twice_the_same() -> None:
    options = 'dtype = "bfloat16"'
    tiles, kernels = trained("AMX", options)
    vectors, none = trained("none", options)
    assert kernels[0] > 6 and kernels[1] == 0 and kernels[2] > 0
    assert none == [0, 0, 0]
    assert tiles != vectors
    for (loss, norm), (wanted, wanted_norm) in zip(tiles, vectors, strict=True):
        assert loss == pytest.approx(wanted, rel=3e-4)
        assert norm == pytest.approx(wanted_norm, rel=1e-2)
    assert trained("AMX", options)[0] == tiles


def test_float32_by_parts_is_nearly_exact() -> None:
    parts, kernels = trained("AMX", 'float32_products = "bfloat16x3"')
    exact, none = trained("AMX", "")
    assert kernels[0] == kernels[1] > 6
    assert none == [0, 0, 0]
    assert parts != exact
    for (loss, norm), (wanted, wanted_norm) in zip(parts, exact, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert norm == pytest.approx(wanted_norm, rel=1e-4)
