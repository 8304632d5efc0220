"""The tensors of a step share memory: no two that live at once, and with hardly any holes."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinygrad import Tensor, TinyJit, dtypes
from tinygrad.helpers import GlobalCounters
from tinygrad.uop.ops import Ops, UOp

from tinyllama.config import (
    Config,
    DataConfig,
    LlamaConfig,
    TrainingConfig,
)
from tinyllama.ops import cross_entropy, forms
from tinyllama.runtime import layout
from tinyllama.runtime.layout import (
    BLOCK_BYTES,
    Life,
    placed,
    shared,
)
from tinyllama.runtime.patches import install
from tinyllama.train.memory_estimate import estimate_memory

LIVES = st.lists(
    st.builds(
        lambda first, length, nbytes: Life(first, first + length, nbytes),
        st.integers(0, 40),
        st.integers(0, 20),
        st.integers(1, 5000),
    ),
    max_size=40,
)

SHAPES = [(32, 256), (256, 64), (64, 512), (512, 128), (128, 256), (256, 32)]


def together(a, b):
    return a.first <= b.last and b.first <= a.last


def alive_bytes(lives):
    """The largest sum of bytes alive at one moment."""
    moments = {life.first for life in lives}
    return max((sum(x.nbytes for x in lives if x.first <= m <= x.last) for m in moments), default=0)


@given(LIVES)
def test_what_lives_together_never_overlaps(lives):
    offsets, size = placed(lives)
    for (a, at), (b, bt) in itertools.combinations(zip(lives, offsets, strict=True), 2):
        assert not together(a, b) or at + a.nbytes <= bt or bt + b.nbytes <= at
    assert all(offset % BLOCK_BYTES == 0 for offset in offsets)
    assert all(at + life.nbytes <= size for life, at in zip(lives, offsets, strict=True))
    assert alive_bytes(lives) <= size <= sum(life.nbytes + BLOCK_BYTES for life in lives)


@given(LIVES)
def test_one_memory_serves_tensors_one_after_another(lives):
    groups = shared(lives)
    assert sorted(itertools.chain(*groups)) == list(range(len(lives)))
    for group in groups:
        assert not any(together(lives[a], lives[b]) for a, b in itertools.combinations(group, 2))
        assert lives[group[0]].nbytes == max(lives[i].nbytes for i in group)


def test_tensors_that_follow_each_other_take_the_memory_of_one():
    chain = [Life(n, n + 1, 1000 + n) for n in range(10)]
    assert placed(chain)[1] == 2 * 1024
    assert [len(group) for group in shared(chain)] == [5, 5]
    # In the order of their beginnings, the first would leave a hole too small for the third.
    assert placed([Life(0, 1, 256), Life(0, 3, 256), Life(2, 3, 512)])[1] == 768


def test_a_slice_among_several_devices_is_read_as_a_slice_elsewhere():
    first, other = (UOp.new_buffer("CPU", 64, dtypes.float) for _ in range(2))
    part = UOp(Ops.BUFFER_VIEW, dtypes.float, (first,), (32, 0))
    both = UOp(Ops.MSTACK, dtypes.float, (part, part))
    calls = [UOp(Ops.SINK).call(*taken) for taken in ((first,), (other,), (other, both))]
    ((_, lives),) = layout._lanes(UOp(Ops.LINEAR, src=tuple(calls)), set())
    assert lives == {first: Life(0, 2, 256), other: Life(1, 2, 256)}


def test_a_step_takes_hardly_more_than_lives_at_once(monkeypatch):
    found = []

    def laid_out_bytes(kernels, held):
        for _, lives in layout._lanes(kernels, held):
            sizes = list(lives.values())
            found.append((placed(sizes)[1], alive_bytes(sizes)))
        return 0

    monkeypatch.setattr("tinyllama.runtime.plan.laid_out_bytes", laid_out_bytes)
    training = TrainingConfig(batch_size=1)
    data = DataConfig(context_length=512, val_path=None)
    estimate_memory(Config(model=LlamaConfig.toy_124m(), training=training, data=data))
    ((size, alive),) = found
    assert alive <= size < 1.02 * alive


@pytest.mark.parametrize("slices", [True, False])
def test_a_captured_step_computes_the_same_in_the_memory_that_it_shares(slices, monkeypatch):
    """Also on devices without slices, for which the CPU stands in here."""
    install()
    monkeypatch.setattr(layout, "_has_slices", lambda device: slices)
    rng = np.random.default_rng(2)
    weights = [Tensor(rng.standard_normal((n, m), np.float32)).realize() for n, m in SHAPES]

    def chain(x):
        for weight in weights:
            x = (x @ weight).relu().contiguous()
        return x.realize()

    step = TinyJit(chain)
    x = rng.standard_normal((64, SHAPES[0][0]), np.float32)
    before = GlobalCounters.mem_used
    results = [step(Tensor(x).realize()).numpy() for _ in range(4)]
    expected = x.astype(np.float64)
    for weight in weights:
        expected = np.maximum(expected @ weight.numpy(), 0)
    for result in results:
        np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-3)
    widths = [64 * 4 * m for _, m in SHAPES]
    between = max(a + b for a, b in itertools.pairwise(widths[:-1]))
    used = GlobalCounters.mem_used - before
    assert used <= between + 2 * widths[-1] + 2 * x.nbytes


@pytest.mark.parametrize("form", ["cpu", "portable"])
def test_a_slice_of_what_is_in_memory_already_is_read_from_there(form, monkeypatch):
    install()
    tokens, width, vocab = 33, 31, 257
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, width), np.float32)
    weight = rng.standard_normal((vocab, width), np.float32)
    targets = rng.integers(0, vocab, tokens, np.int32)
    scores = x.astype(np.float64) @ weight.T
    expected = np.log(np.exp(scores).sum(-1)) - scores[np.arange(tokens), targets]
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 12 * vocab - 1)
    with forms.forced(form):
        losses = cross_entropy.token_losses(Tensor(x), Tensor(weight), Tensor(targets).realize())
        np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)
