"""The memory of tensors: adjacent in huge pages, returned to the system, zero when new."""

import errno
import gc
import resource
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from model_helpers import SQUARE
from tinygrad import Device, Tensor, dtypes
from tinygrad.helpers import Context

from tinyllama.config import TrainingConfig
from tinyllama.model.llama import Llama
from tinyllama.runtime import fills, storage
from tinyllama.runtime.fills import finish_background_writes, wait_for_fills
from tinyllama.runtime.patches import install
from tinyllama.runtime.patches.huge_pages import HUGE_PAGE_BYTES
from tinyllama.runtime.storage import (
    fill_zero,
    read,
    write,
    zero_in_background,
)
from tinyllama.system.memory import resident_bytes
from tinyllama.train.optimizer import AdamW

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_huge_pages = pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(),
    reason="the system has no huge pages",
)


def tensors(count: int, bytes_each: int) -> list[Tensor]:
    return [Tensor.empty(bytes_each // 4) for _ in range(count)]


@needs_huge_pages
def test_tensors_side_by_side_lie_in_few_pages():
    some = tensors(32, HUGE_PAGE_BYTES * 3 // 2)
    for tensor in some:
        fill_zero(tensor)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for tensor in some:
        read(tensor)[...] = 1
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    # Each tensor in a mapping of its own would take a huge page and 256 small ones.
    assert faults < 32 * 256 / 4


@pytest.mark.skipif(not HUGE_PAGES.parent.exists(), reason="elsewhere tinygrad maps memory itself")
def test_memory_that_tinygrad_frees_is_given_back():
    kept, dropped = tensors(2, 64 << 20)
    for tensor in (kept, dropped):
        fill_zero(tensor)
        read(tensor)[...] = 1
    with_both = resident_bytes()
    del tensor, dropped
    gc.collect()
    Device["CPU"].allocator.free_cache()  # tinygrad keeps freed memory for the next of its size
    assert with_both - resident_bytes() > 60 << 20
    assert (read(kept) == 1).all()


def test_new_memory_is_zero_where_other_tensors_had_been():
    for value in (1, 2):
        tensor = tensors(1, 8 << 20)[0]
        fill_zero(tensor)
        assert not read(tensor).any()
        read(tensor)[...] = value
        del tensor


@needs_huge_pages
@pytest.mark.parametrize("take", [fill_zero, lambda tensor: write(tensor, np.zeros(tensor.shape))])
def test_a_system_without_memory_is_an_error_that_tinygrad_knows(take, monkeypatch):
    def none_left(*_):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    install()
    monkeypatch.setattr("tinyllama.runtime.patches.huge_pages._Regions.take", none_left)
    with pytest.raises(MemoryError, match=r"Cannot allocate memory|failed on CPU"):
        take(Tensor.empty(3 << 20, dtype=dtypes.float64))


def test_nothing_is_written_before_touching_has_ended(monkeypatch):
    def touch_late(memories: list[np.ndarray]) -> None:
        fills._stop_touching.wait(10)
        time.sleep(0.1)
        for memory in memories:
            memory[...] = 0

    monkeypatch.setattr(fills, "_touch", touch_late)
    tensor = tensors(1, 8 << 20)[0]
    zero_in_background([tensor])
    write(tensor, np.ones(tensor.shape, np.float32))
    time.sleep(0.2)
    assert (read(tensor) == 1).all()


def test_touching_stops_when_a_tensor_is_needed(monkeypatch):
    monkeypatch.setattr(fills, "TOUCH_BYTES", 4096)
    zero_in_background(tensors(1, 2 << 30))  # takes seconds
    wait_for_fills()
    before = resident_bytes()
    finish_background_writes()
    assert resident_bytes() - before < 1 << 30


def test_pages_are_given_out_before_they_are_used():
    before = resident_bytes()
    zero_in_background(tensors(1, 64 << 20))
    wait_for_fills()
    for thread in fills._touching:
        thread.join()
    assert resident_bytes() - before > 60 << 20
    finish_background_writes()


def test_weights_are_made_while_tinygrad_allows_no_allocation():
    """While it generates code on one thread it allows none on any."""
    ready = threading.Event()
    storage.fill_in_background(partial(ready.wait, 10), [])
    model = Llama(SQUARE, seed=None)
    model.initialize_later(1)
    optimizer = AdamW(model.state_dict(), TrainingConfig())
    with Context(ALLOW_DEVICE_USAGE=0):
        ready.set()
        wait_for_fills()
    again = Llama(SQUARE, seed=1)
    for name, tensor in model.state_dict().items():
        assert (read(tensor) == read(again.state_dict()[name])).all() and read(tensor).any()
    assert not any(read(tensor).any() for tensor in optimizer.state_dict().values())
