"""Faults put into the GPU kernels' texts, of which each must be found by a case that runs them."""

from collections.abc import Callable

from gpu_kernels import Wrong


def is_found(old: str, new: str, wrong: Callable[[Callable[[str], str]], object]) -> bool:
    """Whether a case notices that its kernels' texts have `new` where they had `old`.

    `wrong` runs the case with a change of each text, and returns what is wrong: nothing, if all is
    right. Fails if no text of the case has `old`, or if the compiler refuses the fault.
    """
    changed = []

    def change(text: str) -> str:
        changed.append(old in text)
        return text.replace(old, new)

    try:
        found = bool(wrong(change))
    except Wrong:  # the emulator saw what no kernel may do
        found = True
    assert any(changed), f"no kernel of this case has {old!r}"
    return found
