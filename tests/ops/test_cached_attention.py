"""Attention over a cache: both forms against numpy, in steps of several and of one token."""

import numpy as np
import pytest
from tinygrad import Tensor, dtypes

from tinyllama.ops import forms
from tinyllama.ops.cached_attention import cached_attention, new_cache

FORMS = ["cpu", "portable"]
ROUNDING = {dtypes.float32: 2e-6, dtypes.bfloat16: 2**-6, dtypes.float16: 2**-9}


def expected(q, k, v, window):
    """q (T, H, D), k, v (T, KV, D) of a whole sequence -> (T, H, D), in float64."""
    T, H, D = q.shape
    shared = H // k.shape[1]
    out = np.empty(q.shape)
    for t in range(T):
        first = 0 if window is None else max(0, t + 1 - window)
        for h in range(H):
            scores = k[first : t + 1, h // shared] @ q[t, h] / np.sqrt(D)
            weights = np.exp(scores - scores.max())
            out[t, h] = weights / weights.sum() @ v[first : t + 1, h // shared]
    return out


SIZES = [(6, 2, 20, None), (3, 3, 64, None), (4, 1, 128, 7), (2, 2, 6, 1)]
# Other types make no difference to the portable form, which is slow to schedule.
CASES = [("cpu", dtype, *sizes) for dtype in ROUNDING for sizes in SIZES]
CASES += [("portable", dtypes.float32, *sizes) for sizes in SIZES[::2]]


@pytest.mark.parametrize(("form", "dtype", "heads", "kv_heads", "width", "window"), CASES)
def test_steps_give_what_the_whole_sequence_gives(form, dtype, heads, kv_heads, width, window):
    """Steps of 13, 1, 1, 16 and 1 tokens, in 32 slots that held something else before."""
    rng = np.random.default_rng(0)
    steps = [13, 1, 1, 16, 1]
    with forms.forced(form):
        given = [
            Tensor(rng.standard_normal((1, 32, n, width)).astype(np.float32)).cast(dtype).realize()
            for n in (heads, kv_heads, kv_heads)
        ]
        cache = new_cache(kv_heads, 32, width, dtype)
        for part in cache:
            part.assign(Tensor.full(part.shape, 3e4, dtype=dtype).contiguous()).realize()
        found, start = [], 0
        for step in steps:
            q, k, v = (x[:, start : start + step].contiguous().realize() for x in given)
            position = Tensor([start], dtype=dtypes.int32).realize()
            out = cached_attention(q, k, v, cache, position, window)
            assert out.shape == q.shape and out.dtype == dtype
            found.append(out.float().numpy()[0])
            start += step
        values = [x.float().numpy()[0].astype(np.float64) for x in given]
    want = expected(*values, window)
    assert np.abs(np.concatenate(found) - want).max() < ROUNDING[dtype] * np.abs(want).max()


@pytest.mark.parametrize("form", FORMS)
def test_tokens_past_the_last_slot_are_left_out(form):
    """The padding of a prompt's last chunk may reach beyond the cache."""
    rng = np.random.default_rng(0)
    with forms.forced(form):
        q, k, v = (Tensor(rng.standard_normal((1, 4, 2, 8)).astype(np.float32)) for _ in range(3))
        cache = new_cache(2, 16, 8, dtypes.float32)
        position = Tensor([14], dtype=dtypes.int32)
        cached_attention(q.realize(), k.realize(), v.realize(), cache, position.realize()).realize()
        held = cache.values.numpy()
    assert (held[:, :14] == 0).all()
    assert (held[:, 14:] == v.numpy()[0, :2].transpose(1, 0, 2)).all()


@pytest.mark.parametrize(("form", "window"), [("cpu", None), ("cpu", 3), ("portable", None)])
def test_one_token_of_several_sequences_is_that_of_each_alone(form, window):
    """Three sequences of 2, 9 and 17 tokens, in a cache that holds a fourth, untouched one."""
    rng = np.random.default_rng(1)
    lengths, (H, KV, D, S) = (2, 9, 17), (4, 2, 12, 32)
    whole = [rng.standard_normal((3, 18, n, D)).astype(np.float32) for n in (H, KV, KV)]
    with forms.forced(form):
        cache = new_cache(KV, S, D, dtypes.float32, sequences=4)
        untouched = [np.full(part.shape, 5.0, np.float32) for part in cache]
        for b, length in enumerate(lengths):
            alone = new_cache(KV, S, D, dtypes.float32)
            q, k, v = (Tensor(part[b : b + 1, :length]).realize() for part in whole)
            position = Tensor([0], dtype=dtypes.int32).realize()
            cached_attention(q, k, v, alone, position, window).realize()
            for all_of_them, part in zip(untouched, alone, strict=True):
                all_of_them[b * KV : (b + 1) * KV] = part.numpy()
        for part, values in zip(cache, untouched, strict=True):
            part.assign(Tensor(values)).realize()
        picked = [
            Tensor(np.stack([part[b, n : n + 1] for b, n in enumerate(lengths)])).realize()
            for part in whole
        ]
        positions = Tensor([*lengths], dtype=dtypes.int32).realize()
        found = cached_attention(*picked, cache, positions, window).numpy()
        assert found.shape == (3, 1, H, D)
        for part, values in zip(cache, untouched, strict=True):
            assert (part.numpy()[3 * KV :] == 5.0).all()
            assert (part.numpy() != values).sum() == 3 * KV * D
    for b, length in enumerate(lengths):
        q, k, v = (part[b, : length + 1].astype(np.float64) for part in whole)
        assert np.abs(found[b] - expected(q, k, v, window)[-1:]).max() < 1e-5


# Widths around the limit, and one whose rows would be larger than a thread's stack of 8 MB.
@pytest.mark.parametrize("width", [1 << 14, (1 << 14) + 1, 1 << 19])
def test_heads_too_wide_for_the_stack_are_computed_too(width):
    rng = np.random.default_rng(0)
    q, k, v = (Tensor(rng.standard_normal((1, 4, 1, width), np.float32)) for _ in range(3))
    cache = new_cache(1, 16, width, dtypes.float32)
    position = Tensor([0], dtype=dtypes.int32)
    given = [x.realize() for x in (q, k, v, position)]
    found = cached_attention(*given[:3], cache, given[3]).numpy()[0]
    want = expected(*(x.numpy()[0].astype(np.float64) for x in (q, k, v)), None)
    assert np.abs(found - want).max() < 1e-5 * np.abs(want).max()
