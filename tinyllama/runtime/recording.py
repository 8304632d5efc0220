"""Recording: captured steps note when their kernels run, and which lines these come from.

The patches import what times kernels (timing.py), so what installs them stands here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tinyllama.runtime import sources
from tinyllama.runtime.patches import install
from tinyllama.runtime.patches.recording import divided_into, noted_by
from tinyllama.runtime.timing import EventGraph, Recorder, WaitingGraph, collecting


@contextmanager
def recording() -> Iterator[Recorder]:
    """Steps that are captured within note when their kernels run, and which lines they come from.

    Also batches of one kernel are graphs meanwhile: tinygrad starts a lone one by itself.
    """
    install()  # before, or what patches replace would be put back
    with collecting() as recorder, sources.tracked(noted_by), divided_into(_graph_of):
        yield recorder


def _graph_of(device: str) -> Any:
    """What runs the batches of a step on a device; None for those whose own graphs measure."""
    if device in ("CPU", "CL"):
        return None
    return EventGraph if device == "CUDA" else WaitingGraph
