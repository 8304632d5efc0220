"""Contracts of pure functions, which CrossHair tries to break by symbolic execution.

Each function here calls the product's own with arguments of any value, and asserts what must hold.
Run by test_contracts.py: `crosshair check --analysis_kind=asserts tests/proofs/contracts.py`.
"""

from tinyllama.config.options import got, listed
from tinyllama.ops.gpu.gemm import Tile, best_split
from tinyllama.ops.matmul import _scratch_floats, _scratch_floats_amx
from tinyllama.train.schedule import Place


def scratch_is_whole_kilofloats(m: int, n: int, k: int, narrow: bool) -> None:
    """Scratch is positive and a multiple of 1,024 floats for any sizes."""
    assert m > 0 and n > 0 and k > 0
    for bound in (_scratch_floats, _scratch_floats_amx):
        floats = bound(m, n, k, narrow)
        assert floats % 1024 == 0 and floats >= 1024, floats


def steps_are_enough_for_what_is_left(
    step: int, epoch: int, window: int, n_windows: int, num_epochs: int, batch_size: int
) -> None:
    """The steps of a run visit every window that is left, and none would be empty."""
    assert 0 <= step < 1000 and 1 <= num_epochs < 100 and 0 <= epoch < num_epochs
    assert 1 <= n_windows < 1000 and 0 <= window < n_windows and 1 <= batch_size < 1000
    place = Place(step, epoch, window, n_windows, num_epochs, None)
    left = place.total_steps(batch_size) - step
    windows = n_windows - window + (num_epochs - epoch - 1) * n_windows
    assert left * batch_size >= windows, (left, windows)
    assert (left - (num_epochs - epoch)) * batch_size < windows, (left, windows)


def max_steps_is_a_limit(step: int, n_windows: int, batch_size: int, max_steps: int) -> None:
    """A run never has more steps than max_steps."""
    assert 0 <= step <= max_steps and 1 <= n_windows and 1 <= batch_size
    total = Place(step, 0, 0, n_windows, 1, max_steps).total_steps(batch_size)
    assert step <= total <= max_steps, total


def parts_of_a_sum_are_within_limits(M: int, N: int, K: int) -> None:
    """A product is divided into 1 to 12 parts, never into more than it has tiles along K."""
    assert 0 < M < 4096 and 0 < N < 4096 and 0 < K < 4096
    split = best_split(M, N, K, Tile(), 132, 350e12)
    assert 1 <= split <= min(12, -(-K // 32)), split


def a_message_names_what_was_found(value: str, allowed: str) -> None:
    """A problem is one line that holds what is allowed, whatever a file says."""
    assert len(value) < 20 and len(allowed) < 20
    assert "\n" not in allowed
    message = got(value, allowed)
    assert message.endswith(allowed), message
    assert "\n" not in message, message


def a_list_names_every_item(first: str, second: str, third: str) -> None:
    """`a, b or c` holds every item in its order."""
    assert all(len(word) < 8 for word in (first, second, third))
    text = listed([first, second, third])
    assert text.index(first) <= len(first) + len(second) + len(third) + 8
    assert text.endswith(third), text
