"""Kernels for a GPU are compiled side by side, while their graph is built; no card is needed."""

from pathlib import Path

from fake_cuda import needs_nvrtc
from runs_helpers import ROOT, printed_json

pytestmark = needs_nvrtc

# Captures a step for a card that is not there; says what was compiled on which thread, how often
# the wait was shown, and which texts tinygrad compiled by itself afterwards.
CAPTURE = f"""
import json, sys, threading
from tinyllama.system import device
device.select()
sys.path[:0] = [{str(ROOT / "tests/helpers")!r}]
from model_helpers import SQUARE, build
from tinygrad import Tensor, dtypes
from tinyllama.config import TrainingConfig
from tinyllama.ops.adamw import SCALARS
from tinyllama.runtime import precompile
from tinyllama.runtime.patches.cubin import CubinCompiler
from tinyllama.train.optimizer import AdamW
from tinyllama.train.step import TrainStep

threads, shown = [], []
compile = CubinCompiler.compile
def noting(self, text):
    threads.append(threading.current_thread().name)
    return compile(self, text)
CubinCompiler.compile = noting
precompile.show_waiting(lambda done, total: shown.append((done, total)))
model = build(SQUARE)
optimizer = AdamW(model.state_dict(), TrainingConfig(), blank=True)
step = TrainStep(model, optimizer, 1)
batch = [Tensor.empty(2, 16, dtype=dtypes.int32).realize() for _ in range(3)]
step._whole(*batch, Tensor.empty(len(SCALARS)).realize())
print(json.dumps([threads, shown]))
"""


def captured(cache: Path, **variables: str) -> tuple[list[str], list[list[int]]]:
    variables |= {"DEV": "NULL:CUDA:sm_90", "TINYLLAMA_KERNEL_CACHE": str(cache)}
    threads, shown = printed_json("-c", CAPTURE, **variables)
    return threads, shown


def test_kernels_are_compiled_side_by_side(tmp_path: Path) -> None:
    threads, shown = captured(tmp_path / "kernels")
    assert len(threads) > 30
    assert all(name.startswith("compiler") for name in threads)
    assert sum(total for done, total in shown if done == 1) == len(threads)
    assert [done for done, total in shown if done == total]
    again, shown = captured(tmp_path / "kernels")
    assert (again, shown) == ([], [])  # everything is in the cache
