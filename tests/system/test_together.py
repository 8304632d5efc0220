"""Work on several threads, where it is worth their start."""

import threading

import pytest

from tinyllama.system.threads import together


@pytest.mark.parametrize(("work", "is_here"), [(0, True), (1 << 30, False)])
def test_results_are_in_order_and_threads_only_where_there_is_much_to_read(
    work: int, is_here: bool
) -> None:
    places: list[bool] = []

    def add(x: int, y: int) -> int:
        places.append(threading.current_thread() is threading.main_thread())
        return x + y

    assert together(add, range(5), [10] * 5, work=work) == [10, 11, 12, 13, 14]
    assert places == [is_here] * 5
