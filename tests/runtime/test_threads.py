"""A captured step by one native call per thread: the same numbers, in order, whatever waits."""

import gc
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from model_helpers import SQUARE, build, random_batch
from runs_helpers import environment
from tinygrad import Tensor, UOp
from tinygrad.device import Device
from tinygrad.engine.realize import graph_cache
from tinygrad.helpers import Context
from tinygrad.runtime.graph.hcq import HCQGraph
from tinygrad.uop.ops import Ops

from tinyllama.config import TrainingConfig
from tinyllama.model.llama import Llama
from tinyllama.runtime import threads
from tinyllama.runtime.capture import captured
from tinyllama.runtime.storage import read
from tinyllama.runtime.threads import NativeGraph
from tinyllama.train.optimizer import AdamW
from tinyllama.train.step import TrainStep


def graphs(jit):
    """The objects that run the batches of a captured step."""
    calls = [call.src[0] for call in jit.captured.linear.src]
    return [graph_cache[call] for call in calls if call.op is Ops.CUSTOM_FUNCTION]


def kinds(jit):
    return {type(graph) for graph in graphs(jit)}


def doubled(x):
    return ((x + 1).contiguous() * 2).contiguous().realize()


def vector(*values):
    return Tensor(list(values)).realize()


def once(function):
    jit = captured(function)
    assert jit(vector(1, 2)).tolist() == [4, 6]
    return jit


def trained(micro_batches):
    """Results of three optimizer steps, the state after them, and what ran the steps."""
    model: Llama = build(SQUARE)
    optimizer = AdamW(model.state_dict(), TrainingConfig(grad_clip=0.5, weight_decay=0.1))
    step = TrainStep(model, optimizer, micro_batches)
    batches = [[random_batch(SQUARE, seed=n)] * micro_batches for n in range(3)]
    results = [step(batch, n + 1, 0.01) for n, batch in enumerate(batches)]
    tensors = model.state_dict() | optimizer.state_dict()
    state = {name: read(tensor).tobytes() for name, tensor in tensors.items()}
    return results, state, kinds(step._whole if micro_batches == 1 else step._update)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_training_is_bit_equal_to_tinygrads_own_launches(monkeypatch, micro_batches):
    *native, kind = trained(micro_batches)
    assert kind == {NativeGraph}
    monkeypatch.setattr(threads, "_can_launch", lambda calls: False)
    *tinygrads, kind = trained(micro_batches)
    assert kind == {HCQGraph}
    assert native == tinygrads


def test_each_call_reads_its_own_inputs_in_the_order_of_the_calls():
    """Calls of one graph that use each other's results follow without waiting in between."""
    total = vector(0.0, 0.0, 0.0)
    add = captured(lambda a, b: total.assign((total * 2).contiguous() + a * b).realize())
    expected = np.zeros(3)
    rng = np.random.default_rng(0)
    parts = rng.integers(-3, 4, (12, 2, 3)).astype(np.float32)
    tensors = [[Tensor(array).realize() for array in pair] for pair in parts]
    for (a, b), (x, y) in zip(tensors, parts, strict=True):
        add(a, b)
        expected = expected * 2 + x * y
    assert kinds(add) == {NativeGraph}
    assert total.tolist() == expected.tolist()


def test_variables_get_the_values_of_each_call():
    x = Tensor(np.arange(12, dtype=np.float32)).realize()
    index = UOp.variable("index", 0, 10)

    def chosen(x, at):
        part = x.shrink(((at, at + 2),)).contiguous()
        return (part * 10).contiguous().realize()

    jit = captured(chosen)
    for at in (3, 7, 0, 10):
        assert jit(x, index.bind(at)).tolist() == [at * 10, at * 10 + 10]
    assert kinds(jit) == {NativeGraph}


def test_a_step_that_is_dropped_while_it_waits_still_runs():
    jit = captured(doubled)
    jit(vector(1, 2))
    x = vector(3, 4)
    gc.collect()  # tinygrad's own graphs of other tests, which wait for the device as they go
    dropped = threading.Event()
    Device["CPU"].tasks.put([lambda thread: dropped.wait(30), 1, 0])
    result = jit(x)
    ran = weakref.ref(graphs(jit)[0])
    del jit
    gc.collect()
    assert ran() is None
    dropped.set()
    assert result.tolist() == [8, 10]


def test_a_batch_says_how_long_it_took():
    jit = captured(doubled)
    x = vector(1, 2)
    jit(x)
    (graph,) = graphs(jit)
    Device["CPU"].tasks.put([lambda thread: time.sleep(0.2), 1, 0])
    assert 0.15 < graph((x.uop.base,), {}, wait=True) < 20
    assert graph((x.uop.base,), {}) is None


def test_what_the_table_cannot_hold_runs_tinygrads_way(monkeypatch):
    monkeypatch.setattr(threads, "MOST_ARGUMENTS", 2)
    total = captured(lambda a, b: ((a + b).contiguous() * 2).contiguous().realize())
    for _ in range(2):
        assert total(vector(1, 2), vector(3, 4)).tolist() == [8, 12]
    assert kinds(total) == {HCQGraph}


def test_many_arguments_are_passed():
    def total(*tensors):
        return (sum(tensors[1:], tensors[0]).contiguous() + 1).contiguous().realize()

    for count in (3, 15, 60, 100):
        jit = captured(total)
        for start in (0, 1000):
            tensors = [vector(start + n) for n in range(count)]
            assert jit(*tensors).tolist() == [sum(range(start, start + count)) + 1]
        assert kinds(jit) == {NativeGraph}


def test_switched_off_or_profiled_it_is_tinygrads_way(monkeypatch):
    monkeypatch.setenv("TINYLLAMA_KERNELS", "0")
    assert kinds(once(doubled)) == {HCQGraph}
    monkeypatch.setenv("TINYLLAMA_KERNELS", "1")
    assert kinds(once(doubled)) == {NativeGraph}
    monkeypatch.setattr(threads, "PROFILE", 1)
    assert kinds(once(doubled)) == {HCQGraph}


def test_a_graph_over_two_devices_is_left_to_tinygrad():
    with Context(DEV="CPU"):
        jit = captured(lambda a, b: [doubled(a), doubled(b)])
        x, y = vector(1, 2), vector(3, 4).to("CPU:1").realize()
        for _ in range(2):
            assert [t.tolist() for t in jit(x, y)] == [[4, 6], [8, 10]]
        assert NativeGraph not in kinds(jit)


@pytest.mark.parametrize("threads", [1, 5])
def test_any_number_of_threads_gives_the_same(threads):
    """More threads than cores take turns: any thread runs a part that no other has begun."""
    script = """
from tinyllama.system import device
device.select()
import sys
sys.path[:0] = ["tests/helpers", "tests/runtime"]
import numpy as np
from test_threads import graphs, NativeGraph, trained
from tinygrad import Tensor
from tinyllama.ops.matmul import linear
from tinyllama.runtime.capture import captured

x = Tensor(np.arange(300 * 64).reshape(300, 64).astype(np.float32) % 7).realize()
def chain(x):
    for _ in range(12):
        x = (linear(x, x[:64]) % 7).contiguous()
    return x.realize()
jit = captured(chain)
for _ in range(20):
    found = jit(x)
expected = x.numpy()
for _ in range(12):
    expected = (expected @ expected[:64].T) % 7
assert (found.numpy() == expected).all()
print({graph.threads for graph in graphs(jit)}, trained(1)[2] == {NativeGraph})
"""
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment(NUM_CPU_THREADS=str(threads)),
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == f"{{{threads}}} True"
