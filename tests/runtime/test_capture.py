"""Captured steps, and what their users may know of them."""

import time

from tinygrad import Tensor

from tinyllama.runtime.capture import captured, kernel_count, synchronize
from tinyllama.runtime.cpu import cpu_device
from tinyllama.runtime.storage import alias, memory_key, read


def vector(*values: float) -> Tensor:
    return Tensor(list(values)).contiguous().realize()


def test_a_step_is_captured_at_its_first_call() -> None:
    calls = []

    def step(x: Tensor) -> Tensor:
        calls.append(1)
        return (x + 1).contiguous().realize()

    jit = captured(step)
    assert [jit(vector(n)).item() for n in (1, 2, 3)] == [2, 3, 4]
    assert len(calls) == 1


def test_every_kernel_of_a_step_is_counted() -> None:
    """Also those of a graph, which tinygrad counts as one."""
    for count in (1, 5):

        def step(x: Tensor, count: int = count) -> Tensor:
            for _ in range(count):
                x = (x * 2).contiguous()
            return x.realize()

        jit = captured(step)
        assert jit(vector(1)).item() == 2**count
        assert kernel_count(jit) == count


def test_synchronizing_waits_for_the_device() -> None:
    vector(1)
    done: list[int] = []

    def slow(_thread: int) -> None:
        time.sleep(0.2)
        done.append(1)

    cpu = cpu_device()
    step = captured(lambda x: (x + 1).contiguous().realize())
    step(vector(1))
    cpu.tasks.put([slow, 1, 0])
    step(vector(2))
    synchronize()
    assert done == [1]


def test_an_alias_is_the_same_memory() -> None:
    x = vector(1, 2, 3, 4)
    other = alias(x)
    keys = {memory_key(t) for t in (x, other, x.reshape(2, 2))}
    assert len(keys) == 1 and memory_key(vector(1, 2, 3, 4)) not in keys
    other.assign(other + 1).realize()
    assert read(x).tolist() == [2, 3, 4, 5]
