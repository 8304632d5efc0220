"""Every operation's CPU kernel against its portable form: values and all gradients.

The portable form always runs in float32, on the numbers that the narrow type holds, so that a
narrow kernel is held to the exact result and not to another rounding of it.
"""

import os

import numpy as np
import pytest
from model_helpers import difference
from tinygrad import Tensor, dtypes
from tinygrad.helpers import GlobalCounters

from tinyllama.ops import adamw, cross_entropy, forms, rope
from tinyllama.ops.attention import attention
from tinyllama.ops.embedding import embedding
from tinyllama.ops.matmul import linear
from tinyllama.ops.rms_norm import rms_norm
from tinyllama.ops.swiglu import swiglu
from tinyllama.runtime import c_kernel
from tinyllama.system import device

F32, BF16, F16 = dtypes.float32, dtypes.bfloat16, dtypes.float16
TOLERANCE = {F32: 1e-5, BF16: 1e-2, F16: 2e-3}


@pytest.fixture(autouse=True)
def threads_as_before(monkeypatch):
    """A test may change the number of threads; the next one starts with what there was."""
    count = device.threads()
    monkeypatch.setenv("NUM_CPU_THREADS", str(count))
    yield
    device.set_threads(count)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def values(form, function, arrays, types):
    """function(tensors), then its gradient with respect to each, for a made-up output gradient."""
    with forms.forced(form):
        pairs = zip(arrays, types, strict=True)
        tensors = [Tensor(a).cast(t).contiguous().realize() for a, t in pairs]
        out = function(*tensors)
        upstream = Tensor(np.asarray(normal(*out.shape, seed=9))).cast(out.dtype).realize()
        found = [out, *out.gradient(*tensors, gradient=upstream)]
        Tensor.realize(*found)
        return [t.float().numpy() for t in found]


def compare(function, arrays, dtype=F32, *, narrow=None, threads=2, tolerance=None):
    """Hold kernel to portable form. narrow: which arrays have the type `dtype`; by default all.

    Numbers are of the order of 1, so what should be 0 is held to a tenth of the tolerance.
    """
    narrow = [True] * len(arrays) if narrow is None else narrow
    given = [dtype if n else F32 for n in narrow]
    rounded = [Tensor(a).cast(t).float().numpy() for a, t in zip(arrays, given, strict=True)]
    expected = values("portable", function(F32), rounded, [F32] * len(arrays))
    device.set_threads(threads)
    found = values("cpu", function(dtype), rounded, given)
    for part, (a, b) in enumerate(zip(found, expected, strict=True)):
        limit = tolerance or TOLERANCE[dtype]
        assert difference(a, b, floor=0.1) < limit, f"result {part} of value and gradients"


@pytest.mark.parametrize(
    ("rows", "inner", "outer", "dtype", "threads"),
    [
        (1, 1, 7, F32, 1),
        (7, 33, 31, F32, 3),
        (33, 257, 7, F32, 2),
        (257, 31, 33, F32, 1),
        (31, 33, 257, BF16, 2),
        (33, 31, 257, F16, 2),
    ],
)
def test_linear(rows, inner, outer, dtype, threads):
    arrays = [normal(rows, inner), normal(outer, inner)]
    compare(lambda _: linear, arrays, dtype, narrow=[True, False], threads=threads)


def test_linear_keeps_leading_axes():
    with forms.forced("cpu"):
        x, w = Tensor(normal(3, 11, 257)).realize(), Tensor(normal(7, 257)).realize()
        assert difference(linear(x, w).numpy(), normal(3, 11, 257) @ normal(7, 257).T) < 1e-6


def test_linear_passes_gradients_that_are_no_buffer_of_their_own():
    """A gradient may arrive as a view: here every row of dy is the same one."""
    arrays = normal(7, 33), normal(31, 33)
    device.set_threads(3)
    with forms.forced("cpu"):
        x, w = (Tensor(a).realize() for a in arrays)
        dx, dw = (linear(x, w).sum(0) * Tensor(normal(31))).sum().gradient(x, w)
    dy = np.broadcast_to(normal(31), (7, 31))
    assert difference(dx.numpy(), dy @ arrays[1]) < 1e-6
    assert difference(dw.numpy(), dy.T @ arrays[0]) < 1e-6


DOCUMENTS = {1: [0], 7: [0, 1, 6], 31: [0, 30], 33: [0, 7, 20], 257: [0, 1, 96, 97, 250]}


def starts_of(B, T):
    """First tokens of documents: row 0 holds several, the last row of more than one only one."""
    row = np.zeros((B, T), np.int32)
    for begin in DOCUMENTS[T]:
        row[0, begin:] = begin
    return row


@pytest.mark.parametrize(
    ("B", "T", "H", "KV", "D", "dtype", "threads"),
    [
        (2, 33, 4, 2, 8, F32, 3),
        (2, 33, 4, 2, 8, F16, 1),
        (1, 257, 3, 1, 34, F32, 2),
        (1, 257, 3, 1, 34, BF16, 3),
    ],
)
def test_attention(B, T, H, KV, D, dtype, threads):
    starts = Tensor(starts_of(B, T)).realize()
    arrays = [normal(B, T, H, D, seed=1), *(normal(B, T, KV, D, seed=s) for s in (2, 3))]
    compare(lambda _: lambda *qkv: attention(*qkv, starts), arrays, dtype, threads=threads)


def test_attention_of_large_scores_is_finite():
    """Scores of hundreds: only their differences may be exponentiated."""
    starts = Tensor(starts_of(2, 33)).realize()
    arrays = [normal(2, 33, 4, 8, seed=1) * 12, normal(2, 33, 2, 8, seed=2) * 12]
    arrays.append(normal(2, 33, 2, 8, seed=3))
    function = lambda _: lambda *qkv: attention(*qkv, starts)  # noqa: E731
    compare(function, arrays, threads=3, tolerance=1e-3)  # a float32 of 500 is good to 3e-5


@pytest.mark.parametrize("form", ["cpu", "portable"])
def test_attention_sees_neither_later_tokens_nor_other_documents(form):
    """Changing one key and value changes exactly the outputs that may look at it."""
    B, T, H, KV, D = 2, 33, 4, 2, 8
    starts = starts_of(B, T)
    q, k, v = normal(B, T, H, D), normal(B, T, KV, D, seed=1), normal(B, T, KV, D, seed=2)
    with forms.forced(form):
        first = Tensor(starts).realize()
        call = lambda k, v: attention(*(Tensor(a).realize() for a in (q, k, v)), first).numpy()  # noqa: E731
        before = call(k, v)
        for changed in (0, 8, 19, 20, 32):
            k2, v2 = k.copy(), v.copy()
            k2[:, changed] += 1
            v2[:, changed] -= 1
            differs = (call(k2, v2) != before).any((2, 3))  # (B, T)
            position = np.arange(T)
            allowed = (position >= changed) & (starts <= changed)
            np.testing.assert_array_equal(differs, allowed)


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "threads"),
    [
        (1, 1, F32, 2),
        (7, 33, F32, 3),
        (257, 31, F32, 2),
        (33, 257, F32, 1),
        (33, 257, BF16, 2),
        (7, 33, F16, 1),
    ],
)
def test_rms_norm(rows, width, dtype, threads):
    arrays = [normal(rows, width), normal(width)]
    function = lambda _: lambda x, w: rms_norm(x, w, 0.1)  # noqa: E731
    compare(function, arrays, dtype, narrow=[True, False], threads=threads)


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "threads"),
    [(1, 1, F32, 1), (33, 257, F32, 2), (257, 7, F32, 3), (33, 257, BF16, 3), (33, 257, F16, 1)],
)
def test_swiglu(rows, width, dtype, threads):
    arrays = [normal(rows, width) * 4, normal(rows, width, seed=1)]
    compare(lambda _: swiglu, arrays, dtype, threads=threads)


def test_swiglu_of_large_gates_is_finite():
    gate = np.linspace(-200, 200, 7 * 33, dtype=np.float32).reshape(7, 33)
    compare(lambda _: swiglu, [gate, normal(7, 33)])


@pytest.mark.parametrize(
    ("B", "T", "H", "D", "dtype", "threads"),
    [
        (1, 1, 1, 2, F32, 1),
        (2, 33, 3, 14, F32, 3),
        (1, 257, 1, 62, F32, 2),
        (2, 33, 3, 14, BF16, 2),
        (2, 33, 3, 14, F16, 1),
    ],
)
def test_rope(B, T, H, D, dtype, threads):
    cos, sin = (Tensor(a).realize() for a in rope.tables(D, 100.0, T))
    arrays = [normal(B, T, H, D)]
    compare(lambda _: lambda x: rope.rope(x, cos, sin), arrays, dtype, threads=threads)


@pytest.mark.parametrize(
    ("tokens", "vocab", "width", "dtype", "threads"),
    [
        (1, 1, 1, F32, 1),
        (257, 7, 33, F32, 3),
        (33, 257, 31, F32, 2),
        (257, 7, 33, BF16, 2),
        (257, 7, 33, F16, 1),
    ],
)
def test_embedding(tokens, vocab, width, dtype, threads):
    """More tokens than rows: ids repeat, and each adds to its row's gradient."""
    ids = np.random.default_rng(0).integers(0, vocab, (1, tokens)).astype(np.int32)
    ids_tensor = Tensor(ids).realize()
    function = lambda t: lambda w: embedding(ids_tensor, w, t)  # noqa: E731
    with forms.forced("cpu"):
        assert embedding(ids_tensor, Tensor(normal(vocab, width)), dtype).dtype == dtype
    weight = [Tensor(normal(vocab, width)).cast(dtype).float().numpy()]
    compare(function, weight, dtype, narrow=[False], threads=threads)


@pytest.mark.parametrize(("tokens", "vocab"), [(33, 2570), (257, 31)])
def test_the_portable_gradient_of_the_embedding_costs_the_smaller_of_tokens_and_entries(
    tokens, vocab
):
    ids = np.random.default_rng(0).integers(0, vocab, (1, tokens)).astype(np.int32)
    ids[0, ::3] = ids[0, 0]
    weight, grad = (Tensor(normal(*s)).realize() for s in ((vocab, 64), (1, tokens, 64)))
    ids_tensor = Tensor(ids).realize()
    with forms.forced("portable"):
        (found,) = embedding(ids_tensor, weight, F32).gradient(weight, gradient=grad)
        GlobalCounters.reset()
        found.realize()
    expected = np.zeros((vocab, 64), np.float32)
    np.add.at(expected, ids[0], grad.numpy()[0])
    assert difference(found.numpy(), expected) < 1e-6
    # Beside that product: some operations for each pair of token and entry, and each result.
    product = 3 * tokens * min(tokens, vocab) * 64
    assert GlobalCounters.global_ops < product + 10 * vocab * (tokens + 64)


def targets_of(tokens, vocab):
    """A third of them, the first and the last among these, are not trained."""
    targets = np.random.default_rng(1).integers(0, vocab, tokens).astype(np.int32)
    targets[::3] = -1
    targets[-1] = -1 if tokens > 1 else 0
    return targets


CROSS_ENTROPY = [
    (1, 7, 1, F32, 1),
    (33, 31, 257, F32, 2),
    (33, 31, 257, BF16, 3),
    (33, 31, 257, F16, 1),
]


@pytest.mark.parametrize(("tokens", "width", "vocab", "dtype", "threads"), CROSS_ENTROPY)
def test_cross_entropy(tokens, width, vocab, dtype, threads):
    targets = Tensor(targets_of(tokens, vocab)).realize()
    arrays = [normal(tokens, width), normal(vocab, width, seed=1)]
    if dtype == BF16 and c_kernel.has_bf16_products():  # which round the weight: so does this
        arrays[1] = Tensor(arrays[1]).cast(BF16).float().numpy()
    function = lambda _: lambda x, w: cross_entropy.linear_cross_entropy(x, w, targets)  # noqa: E731
    compare(function, arrays, dtype, narrow=[True, False], threads=threads)


@pytest.mark.parametrize("form", ["cpu", "portable"])
def test_cross_entropy_in_chunks_equals_the_whole(form, monkeypatch):
    """Three chunks of 11 rows, whose gradients of the weight are summed."""
    tokens, width, vocab = 33, 31, 257
    targets = Tensor(targets_of(tokens, vocab)).realize()
    arrays = [normal(tokens, width), normal(vocab, width, seed=1)]
    function = lambda x, w: cross_entropy.linear_cross_entropy(x, w, targets)  # noqa: E731

    def everything():
        with forms.forced(form):
            each = cross_entropy.token_losses(*map(Tensor, arrays), targets).numpy()
        return [*values(form, function, arrays, [F32, F32]), each]

    whole = everything()
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 12 * vocab - 1)
    assert cross_entropy._chunks(tokens, vocab) == [(0, 11), (11, 22), (22, 33)]
    for a, b in zip(everything(), whole, strict=True):
        assert difference(a, b) < 1e-6


@pytest.mark.parametrize("chunk", [1, 7, 64, 10**9])
@pytest.mark.parametrize("tokens", [1, 7, 257])
def test_chunks_cover_every_token_once_and_stay_small(tokens, chunk, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk)
    chunks = cross_entropy._chunks(tokens, 5)
    assert [i for begin, end in chunks for i in range(begin, end)] == list(range(tokens))
    assert all((end - begin) * 5 <= max(chunk, 5) for begin, end in chunks)


@pytest.mark.parametrize("form", ["cpu", "portable"])
def test_token_losses_equal_the_formula(form):
    tokens, width, vocab = 33, 31, 257
    targets = targets_of(tokens, vocab)
    x, w = normal(tokens, width), normal(vocab, width, seed=1)
    logits = x.astype(np.float64) @ w.T.astype(np.float64)
    log_sum = np.log(np.exp(logits).sum(-1))
    expected = np.where(targets < 0, 0, log_sum - logits[np.arange(tokens), targets])
    with forms.forced(form):
        tensors = (Tensor(a).realize() for a in (x, w, targets))
        found = cross_entropy.token_losses(*tensors).numpy()
        summed = cross_entropy.linear_cross_entropy(Tensor(x), Tensor(w), Tensor(targets)).numpy()
    assert difference(found, expected) < 1e-6
    assert summed == pytest.approx(expected.sum(), rel=1e-6)


@pytest.mark.parametrize("form", ["cpu", "portable"])
def test_loss_of_logits_in_the_thousands_is_finite(form):
    x = normal(33, 31) * 1000
    targets = targets_of(33, 257)
    with forms.forced(form):
        tensors = [Tensor(a).realize() for a in (x, normal(257, 31, seed=1), targets)]
        found = values(form, lambda x, w: cross_entropy.linear_cross_entropy(x, w, tensors[2]),
                       [x, normal(257, 31, seed=1)], [F32, F32])  # fmt: skip
    logits = x.astype(np.float64) @ normal(257, 31, seed=1).T.astype(np.float64)
    top = logits.max(-1)
    log_sum = np.log(np.exp(logits - top[:, None]).sum(-1)) + top
    trained = targets >= 0
    expected = (log_sum - logits[np.arange(33), targets])[trained].sum()
    assert float(found[0]) == pytest.approx(expected, rel=1e-5)
    assert np.isfinite(found[1]).all() and np.isfinite(found[2]).all()


@pytest.mark.parametrize("form", ["cpu", "portable"])
def test_a_target_beyond_the_vocabulary_has_no_number_for_a_loss(form):
    """And nothing is written beside the logits: every other row is as it was."""
    x, w, targets = normal(33, 31), normal(257, 31, seed=1), targets_of(33, 257)
    wrong = targets.copy()
    wrong[[1, 31]] = 257, 2**31 - 1
    found = []
    for given in (targets, wrong):
        with forms.forced(form):
            tensors = [Tensor(a).realize() for a in (x, w, given)]
            each = cross_entropy.token_losses(*tensors).numpy()
            summed, dx, _ = cross_entropy.loss_and_gradients(*tensors, True)
            found.append((each, dx.numpy(), summed.item()))
    right, changed = found
    others = ~np.isin(np.arange(33), [1, 31])
    assert np.isnan(changed[0][~others]).all() and np.isnan(changed[2])
    assert not changed[1][~others].any()
    np.testing.assert_array_equal(changed[0][others], right[0][others])
    np.testing.assert_array_equal(changed[1][others], right[1][others])


def test_frozen_head_gets_no_weight_gradient():
    with forms.forced("cpu"):
        x, w = normal(33, 31), normal(257, 31, seed=1)
        targets = Tensor(targets_of(33, 257)).realize()
        both = cross_entropy.loss_and_gradients(Tensor(x), Tensor(w), targets, True)
        frozen = cross_entropy.loss_and_gradients(Tensor(x), Tensor(w), targets, False)
        assert (len(both), len(frozen)) == (3, 2)
        assert difference(frozen[1].numpy(), both[1].numpy()) < 1e-6


SCALARS = np.array([0.5, 0.9, 0.99, 1e-8, 0.3, 0.271, 0.0297, 0.5], np.float32)


@pytest.mark.parametrize(
    ("shape", "decay", "threads"),
    [((1,), False, 1), ((33,), False, 3), ((7, 31), True, 2), ((257, 7), True, 3)],
)
def test_adamw(shape, decay, threads):
    arrays = [normal(*shape), normal(*shape, seed=1), normal(*shape, seed=2) ** 2]
    grad, found = normal(*shape, seed=3), {}
    for form, count in (("portable", 2), ("cpu", threads)):
        device.set_threads(count)
        with forms.forced(form):
            state = [Tensor(a).realize() for a in arrays]
            parameter = adamw.Parameter(*state, Tensor(grad), decay)
            changed = adamw.adamw([parameter], Tensor(SCALARS))
            Tensor.realize(*changed)
            found[form] = [t.numpy() for t in state]
    for before, a, b in zip(arrays, found["cpu"], found["portable"], strict=True):
        assert difference(b, a) < 1e-6
        assert np.abs(b - before).max() > 1e-4


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_square_sum_equals_the_formula(threads):
    arrays = [normal(1), normal(31, 257), normal(7)]
    expected = sum(float((a.astype(np.float64) ** 2).sum()) for a in arrays)
    device.set_threads(threads)
    for form in ("cpu", "portable"):
        with forms.forced(form):
            found = adamw.square_sum([Tensor(a).realize() for a in arrays])
            assert found.item() == pytest.approx(expected, rel=1e-6)


def test_kernels_are_taken_on_the_cpu_unless_switched_off(monkeypatch):
    tensor = Tensor(normal(3))
    assert forms.chosen(tensor) == "cpu"
    assert forms.chosen(tensor.cast(dtypes.float64)) == "portable"
    assert forms.chosen(tensor.to("NULL")) == "portable"
    with forms.forced("portable"):
        assert forms.chosen(tensor) == "portable"
    monkeypatch.setenv("TINYLLAMA_KERNELS", "0")
    assert forms.chosen(tensor) == "portable"
    with forms.forced("cpu"):
        assert forms.chosen(tensor) == "cpu"


def test_threads_share_the_work_whatever_their_number():
    """An environment variable sets it too; fewer than one is refused."""
    device.set_threads(3)
    assert (device.threads(), os.environ["NUM_CPU_THREADS"]) == (3, "3")
    with pytest.raises(device.DeviceError, match="--threads: got 0, must be 1 or more"):
        device.set_threads(0)


def test_a_norm_of_narrow_weights_reads_them_as_what_they_are():
    x, weight = Tensor(normal(5, 48)).realize(), Tensor(normal(48)).cast(BF16).realize()
    found = []
    for form in ("cpu", "portable"):
        with forms.forced(form):
            found.append(rms_norm(x, weight, 1e-6).numpy())
    assert difference(*found) < 1e-6


@pytest.mark.parametrize("kind", [dtypes.int16, dtypes.int64])
def test_integers_of_any_width_are_the_numbers_they_are(kind):
    """Python's own are 64 bits wide, and a kernel reads 32."""
    ids, targets, starts = np.arange(33)[None] % 7, targets_of(33, 7), starts_of(1, 33)
    table, x = normal(7, 16), normal(33, 16, seed=1)
    heads = [normal(1, 33, 2, 8, seed=s) for s in (2, 3, 4)]
    found = []
    for wide in (dtypes.int32, kind):
        with forms.forced("cpu"):
            given = [Tensor(a).cast(wide).realize() for a in (ids, targets, starts)]
            weight, *qkv = (Tensor(a).realize() for a in (table, *heads))
            rows = embedding(given[0], weight, F32)
            summed = cross_entropy.linear_cross_entropy(Tensor(x).realize(), weight, given[1])
            each = cross_entropy.token_losses(Tensor(x).realize(), weight, given[1])
            out = attention(*qkv, given[2])
            gradients = (rows.sum() + summed + out.sum()).gradient(weight, *qkv)
            found.append([t.numpy() for t in (rows, summed, each, out, *gradients)])
    for same, other in zip(*found, strict=True):
        np.testing.assert_array_equal(other, same)
