"""Recording what a step does: when its kernels run, and which lines of the model they come from.

Apart from timing.py and sources.py, which graphs import that patches put in place.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from tinyllama.runtime import sources, timing
from tinyllama.runtime.patches import install
from tinyllama.runtime.patches.recording import divided_into, noted_by


@contextmanager
def recording() -> Iterator[timing.Recorder]:
    """Steps that are captured within note when their kernels run, and which lines they come from.

    Also batches of one kernel are graphs meanwhile: tinygrad starts a lone one by itself.
    """
    install()  # before, or what patches replace would be put back
    with (
        timing.collecting() as recorder,
        sources.tracked(noted_by),
        divided_into(timing.graph_of),
    ):
        yield recorder
