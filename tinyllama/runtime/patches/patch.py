"""What every patch declares."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """One change to how tinygrad behaves, from the moment `apply` is called.

    `replaces` are the attributes of tinygrad that it assigns to, by their full names; `test` is
    the test that fails without it. `needed` says what goes wrong without the patch; it is empty
    where tinygrad's own way works too, and then the patch can be switched off.
    """

    name: str
    replaces: tuple[str, ...]
    why: str
    test: str
    apply: Callable[[], None]
    needed: str = ""
