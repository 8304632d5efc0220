"""AdamW's state in bfloat16: rounded without bias, alike in every form and after a resume."""

import numpy as np
import pytest
from gpu_rows import hashed
from model_helpers import SQUARE, build, random_batch
from runs_helpers import configuration, finished_run, metrics, train
from tinygrad import Tensor, dtypes

from tinyllama.config import Config, DataConfig, TrainingConfig
from tinyllama.formats.safetensors import SafetensorsFile
from tinyllama.ops import adamw, forms
from tinyllama.runtime.storage import read, write
from tinyllama.train.checkpoint import step_name
from tinyllama.train.memory_estimate import estimate_memory, lasting_bytes
from tinyllama.train.optimizer import AdamW
from tinyllama.train.prepare import differences
from tinyllama.train.step import TrainStep
from tinyllama.train.watching import update_ratios

NARROW = "training.optimizer_state=bfloat16"
FORMS = ["portable", "cpu"]
# lr, beta1, beta2, eps, weight_decay, corrections, grad_scale, the key. With halves for betas,
# moments of small fractions are exact before they are rounded, whatever a form contracts.
SCALARS = [0.5, 0.5, 0.5, 1e-8, 0.25, 0.5, 0.5, 1.0, 1234567, 7654321]


def made(values, dtype=dtypes.float32):
    tensor = Tensor.empty(*values.shape, dtype=dtype)
    write(tensor, values)
    return tensor


def upper(values):
    """The upper halves of float32: bfloat16, towards 0."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def wide(halves):
    return (halves.astype(np.uint32) << 16).view(np.float32)


def updated(form, m, v, grad, *, key=(1234567, 7654321), first=77):
    """m and v (bits of bfloat16) after an update by gradients."""
    with forms.forced(form):
        state = [made(np.zeros_like(grad)), made(m, dtypes.bfloat16), made(v, dtypes.bfloat16)]
        parameter = adamw.Parameter(*state, made(grad), False)
        scalars = np.array([*SCALARS[:8], *key], np.float32)
        firsts = made(np.array([first], np.uint32), dtypes.uint32)
        Tensor.realize(*adamw.adamw([parameter], made(scalars), firsts))
        return read(state[1]).copy(), read(state[2]).copy()


@pytest.mark.parametrize("form", FORMS)
def test_moments_are_rounded_by_the_hash_of_their_index(form):
    """m <- (m + g) / 2, v <- (v + g^2) / 2, both exact; the lower half of the bits is m's."""
    rng = np.random.default_rng(0)
    shape, key, first = (37, 129), (1234567, 7654321), 2**32 - 1000  # indices go round at 2^32
    m, v = upper(rng.integers(-64, 64, shape) / 16), upper(rng.integers(0, 64, shape) / 16)
    grad = (rng.integers(-512, 512, shape) / 256).astype(np.float32)
    found = updated(form, m, v, grad, key=key, first=first)
    bits = hashed((first + np.arange(grad.size)) % 2**32, key).reshape(shape)
    wanted = [(wide(m) + grad) / 2, (wide(v) + grad * grad) / 2]
    for moment, exact, random in zip(found, wanted, (bits & 0xFFFF, bits >> 16), strict=True):
        assert (moment == (exact.view(np.uint32) + random) >> 16).all()
        assert 0.02 < (wide(moment) != exact).mean()  # some were rounded


@pytest.mark.parametrize("form", FORMS)
def test_numbers_that_bfloat16_has_stay_as_they_are(form):
    values = np.tile(np.array([0.0, -0.0, 1.0, -1.5, 2.0**-100, 3.984375], np.float32), (50, 1))
    # A gradient equal to m leaves m; one whose square is v leaves v.
    assert (wide(updated(form, upper(values), upper(values), values)[0]) == values).all()
    squares = np.tile(np.array([0.0, 1.0, 0.25, 16.0], np.float32), (50, 1))
    roots = np.sqrt(squares)
    assert (updated(form, upper(roots), upper(squares), roots)[1] == upper(squares)).all()


@pytest.mark.parametrize("form", FORMS)
def test_rounding_is_unbiased(form):
    """2^18 draws of numbers at 1/4, 1/2 and 255/256 of the way to the next bfloat16.

    The mean of n draws that go up with the probability p has the deviation sqrt(p (1 - p) / n):
    4 of them are allowed for each of 6 means, which fair draws exceed once in 2,600 times; these
    draws are always the same ones.
    """
    count = 1 << 18
    for way in (64, 128, 255):  # of 256
        number = np.float32(1 + way / 2**15)  # bfloat16 has 1 and 1 + 2^-7
        grad = np.full(count, 2 * number - 1, np.float32)  # m = 1
        m, v = updated(form, upper(np.ones(count)), upper(np.ones(count)), grad, first=way * count)
        share = way / 256
        allowed = 4 * (share * (1 - share) / count) ** 0.5
        assert abs((m == 0x3F81).mean() - share) < allowed
        assert set(np.unique(m)) == {0x3F80, 0x3F81}
        exact = ((1 + grad[0] * grad[0]) / 2).astype(
            np.float64
        )  # v is between the same two or near
        unit = 2.0**-7
        low = np.floor(exact / unit) * unit
        share = (exact - low) / unit
        allowed = 4 * (share * (1 - share) / count) ** 0.5
        assert abs((wide(v) > low).mean() - share) < allowed + 2**-16  # grad^2 is rounded
        # m and v use different bits: neither tells the other.
        both = ((m == 0x3F81) & (wide(v) > low)).mean()
        assert abs(both - (m == 0x3F81).mean() * (wide(v) > low).mean()) < 4 / count**0.5


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_stays_one_and_infinity_too(form):
    grad = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
    grad[0] = np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0]  # a carry would make it -0
    m, v = updated(form, upper(np.zeros(4)), upper(np.zeros(4)), grad)
    assert np.isnan(wide(m)[0]) and np.isnan(wide(v)[0])
    assert wide(m)[1:].tolist() == [np.inf, -np.inf, 0.5]
    assert wide(v)[1:].tolist() == [np.inf, np.inf, 0.5]


@pytest.mark.parametrize("form", FORMS)
def test_the_key_and_the_place_decide(form):
    count = 4096
    grad = np.full(count, 2 * (1 + 0.5 / 128) - 1, np.float32)  # half of the way
    one = upper(np.ones(count))

    def drawn(**how):
        return updated(form, one, one, grad, **how)[0]

    assert (drawn() == drawn()).all()
    for other in ({"key": (1, 7654321)}, {"key": (1234567, 2)}, {"first": 77 + 10**6}):
        assert 0.4 < (drawn() == drawn(**other)).mean() < 0.6
    # The next parameter goes on where this one ends.
    assert (drawn(first=77 + 96)[:-96] == drawn()[96:]).all()


def test_moments_do_not_stick_where_changes_are_small():
    """To nearest, 1 would never reach 2: a change of (2 - m) / 512 is below half a unit."""
    beta2, count = 1 - 1 / 512, 4096
    v, grad = upper(np.ones(count)), np.full(count, 2**0.5, np.float32)
    with forms.forced("cpu"):
        state = [made(np.zeros(count, np.float32)), made(v, dtypes.bfloat16)]
        square = made(v.copy(), dtypes.bfloat16)
        for step in range(512):
            numbers = [0.0, 0.5, beta2, 1e-8, 0, 0.5, 0.5, 1, 5, step]
            scalars = made(np.array(numbers, np.float32))
            firsts = made(np.zeros(1, np.uint32), dtypes.uint32)
            parameter = adamw.Parameter(*state, square, made(grad), False)
            Tensor.realize(*adamw.adamw([parameter], scalars, firsts))
    expected = 2 - beta2**512  # 1.63
    assert wide(read(square)).mean() == pytest.approx(expected, abs=0.01)


def test_parameters_and_steps_have_bits_of_their_own():
    config = TrainingConfig(optimizer_state="bfloat16", seed=3)
    model = build(SQUARE)
    optimizer = AdamW(model.state_dict(), config)
    keys = {tuple(optimizer.hyperparameters(step, 1e-3, 1)[8:10]) for step in range(1, 50)}
    assert len(keys) == 49
    assert all(float(word).is_integer() and 0 <= word < 2**24 for key in keys for word in key)
    TrainStep(model, optimizer, 1)([random_batch(SQUARE)], 1, 1e-3)
    firsts = {number: read(t).tolist() for number, t in optimizer._firsts.items()}
    sizes = [t.numel() for t in optimizer.parameters.values()]
    assert firsts == {n: [sum(sizes[:n])] for n in range(len(sizes))}


def test_a_step_reads_the_numbers_and_not_their_halves():
    """A run in bfloat16 is close to the one in float32, and not the same."""
    losses = {}
    for state in ("float32", "bfloat16"):
        config = TrainingConfig(optimizer_state=state, grad_clip=0.5)
        model = build(SQUARE)
        optimizer = AdamW(model.state_dict(), config)
        step = TrainStep(model, optimizer, 1, guarded=state == "bfloat16")
        batch = random_batch(SQUARE)
        losses[state] = [step([batch], n, 0.01).loss for n in range(1, 21)]
        assert {t.dtype for t in optimizer.state_dict().values()} == {getattr(dtypes, state)}
        assert update_ratios(optimizer, 20, 0.01)["head"] > 1e-4
    assert losses["float32"][0] == losses["bfloat16"][0]
    assert losses["float32"] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_the_estimate_counts_four_bytes_per_parameter_less():
    def config(state):
        t = TrainingConfig(batch_size=2, optimizer_state=state)
        return Config(model=SQUARE, training=t, data=DataConfig(context_length=32, val_path=None))

    one, other = (estimate_memory(config(state)) for state in ("float32", "bfloat16"))
    assert other.optimizer_state == one.weights == one.optimizer_state // 2
    assert one.tensors - other.tensors == pytest.approx(4 * one.weights // 4, abs=100)
    assert lasting_bytes(config("bfloat16"))["optimizer_state"] == other.optimizer_state


def moments(folder):
    file = SafetensorsFile(folder / "optimizer.safetensors")
    return {name: (file.dtype(name), file.array(name).copy()) for name in file.names}


def test_a_resumed_run_has_the_same_bits(tmp_path):
    whole = tmp_path / "whole"
    train(configuration(whole, NARROW, "training.max_steps=6", "checkpointing.save_every=3"))
    part = tmp_path / "part"
    resumed = configuration(part, NARROW, "training.max_steps=6", "checkpointing.save_every=3")
    train(resumed, resume=whole / step_name(3))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (whole / "final" / name).read_bytes() == (part / "final" / name).read_bytes()
    stored = moments(whole / "final")
    assert {kind for kind, _ in stored.values()} == {"BF16"}
    assert any(values.any() for _, values in stored.values())


def test_resuming_with_the_other_type_converts_and_says_so(tmp_path):
    wide_run, narrow_run = finished_run(), tmp_path / "narrow"
    start = wide_run / step_name(2)
    asked = configuration(narrow_run, NARROW, "training.max_steps=3")
    assert 'training.optimizer_state is "bfloat16", was "float32"' in differences(asked, start)
    train(asked, resume=start)
    assert {kind for kind, _ in moments(narrow_run / "final").values()} == {"BF16"}
    assert max(metrics(narrow_run)) == 3
    back = tmp_path / "back"
    train(configuration(back, "training.max_steps=4"), resume=narrow_run / "final")
    assert {kind for kind, _ in moments(back / "final").values()} == {"F32"}
