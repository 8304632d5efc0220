"""A map over processes: in order, little ahead, and no process left behind."""

import itertools
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from data_helpers import run_python

from tinyllama.errors import DataError
from tinyllama.system.processes import ordered_map


def build_square(fault: str) -> Callable[[int], int]:
    """What a worker applies to its items; at the top level, so that it pickles."""

    def square(item: int) -> int:
        if item == 5 and fault == "error":
            raise DataError("item 5 is bad")
        if item == 5 and fault == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        return item * item

    return square


def test_a_map_keeps_the_order_and_reads_little_ahead() -> None:
    taken = itertools.count()
    items = (next(taken) for _ in range(40))
    results = ordered_map(partial(build_square, ""), items, 2)
    assert next(results) == 0
    assert next(taken) <= 6
    assert list(results)[:3] == [1, 4, 9]


@pytest.mark.parametrize(
    ("fault", "message"), [("error", "item 5 is bad"), ("death", "a process that read the text di")]
)
def test_a_fault_in_a_worker_ends_the_map(fault: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(ordered_map(partial(build_square, fault), range(100), 2))


def test_workers_end_with_a_parent_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    process = run_python("""
        import time
        from tinyllama.system.processes import ordered_map
        def sleep(item):
            print("working", flush=True)
            time.sleep(600)
        def build():
            return sleep
        if __name__ == "__main__":
            list(ordered_map(build, range(4), 2))
    """)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.kill()
    # The pipe ends when the last process that holds it, parent or worker, has ended.
    process.communicate(timeout=10)
