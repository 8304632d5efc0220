"""Slices and the memory planner: read where they lie, and never laid where something else is."""

import numpy as np
import pytest
from tinygrad import Tensor

from tinyllama.ops import cross_entropy, kernel
from tinyllama.ops.memory import keep_what_slices_read


@pytest.mark.parametrize("form", ["cpu", "portable"])
def test_a_slice_of_what_is_in_memory_already_is_read_from_there(form, monkeypatch):
    keep_what_slices_read()
    tokens, width, vocab = 33, 31, 257
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, width), np.float32)
    weight = rng.standard_normal((vocab, width), np.float32)
    targets = rng.integers(0, vocab, tokens, np.int32)
    scores = x.astype(np.float64) @ weight.T
    expected = np.log(np.exp(scores).sum(-1)) - scores[np.arange(tokens), targets]
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 12 * vocab - 1)
    with kernel.forced(form):
        losses = cross_entropy.token_losses(Tensor(x), Tensor(weight), Tensor(targets).realize())
        np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)
