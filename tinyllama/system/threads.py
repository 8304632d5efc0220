"""Work on several threads, where it is worth their start."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")

_LEAST_BYTES = 4 << 20  # read in a millisecond, which starting threads takes too


def together(function: Callable[..., Result], *lists: Iterable[Any], work: int) -> list[Result]:
    """What `function` returns for the elements of the lists, like `map`, on a thread for each
    processor if they are to read `work` bytes that are worth it."""
    if work < _LEAST_BYTES:
        return list(map(function, *lists))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, *lists))
