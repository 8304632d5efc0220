"""Spikes, slow divergence, a slow machine: found where they are, and not where they are not."""

import json
import math
import statistics

import numpy as np
import pytest

from tinyllama.observe.anomalies import (
    SIGMA,
    WARM,
    Anomaly,
    Divergence,
    MachineWatch,
    Spikes,
    Watch,
    Window,
)


def losses(steps: int, seed: int = 0) -> list[float]:
    """A loss as runs have it: falling, with noise of a tenth."""
    noise = np.random.default_rng(seed).normal(0, 0.1, steps)
    return [float(2 + 6 * math.exp(-i / 60) + noise[i]) for i in range(steps)]


def watched(values: list[float], norms: list[float] | None = None) -> list[Anomaly]:
    watch, found = Watch(64), []
    for step, loss in enumerate(values, 1):
        found += watch.numbers(step, loss, norms[step - 1] if norms else 1.0 + 0.01 * (step % 7))
    return found


def test_the_window_has_the_median_and_mad_of_its_last_values() -> None:
    window = Window(5)
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    for count, value in enumerate(values, 1):
        window.add(value)
        kept = values[max(0, count - 5) : count]
        middle = statistics.median(kept)
        assert window.values() == kept
        assert window.median() == middle
        assert window.sigma() == SIGMA * statistics.median(abs(v - middle) for v in kept)


def test_a_falling_noisy_loss_is_no_anomaly() -> None:
    assert watched(losses(5000)) == []


def test_a_spike_is_found_at_its_step_and_leaves_the_limits_as_they_were() -> None:
    values = losses(300)
    values[200] = 6.0
    (spike,) = watched(values)
    assert (spike.step, spike.kind, spike.series, spike.value) == (201, "spike", "loss", 6.0)
    assert spike.usual == statistics.median(values[200 - 64 : 200])


def test_a_gradient_norm_is_compared_by_its_logarithm() -> None:
    rng = np.random.default_rng(1)
    norms = np.exp(rng.normal(0, 0.3, 400)).tolist()
    assert watched(losses(400), norms) == []
    norms[300] = 40.0
    (spike,) = watched(losses(400), norms)
    assert (spike.step, spike.series, spike.value) == (301, "grad_norm", 40.0)


def test_nothing_is_unusual_before_enough_is_known() -> None:
    watch = Watch(64)
    for step in range(1, WARM + 1):
        assert watch.limits() == (math.inf, math.inf)
        watch.numbers(step, 2.0, 1.0)
    assert watch.limits().loss == pytest.approx(2.0 * 1.1)
    assert watch.limits().grad_norm == pytest.approx(4.0)


def test_a_value_that_stays_is_a_new_level_and_not_unusual_for_ever() -> None:
    values = losses(200) + [9.0] * 200
    assert 1 <= len(watched(values)) <= 15


def test_slow_divergence_is_found_without_a_spike() -> None:
    rng = np.random.default_rng(2)
    values = losses(1500)
    values += (values[-1] + np.arange(600) * 0.002 + rng.normal(0, 0.1, 600)).tolist()
    found = watched(values)
    assert found and found[0].kind == "divergence"
    assert 1500 < found[0].step < 1900


def test_page_hinkley_is_quiet_on_noise_and_rings_on_a_step_up() -> None:
    test = Divergence()
    noise = np.random.default_rng(3).normal(0, 1, 20000)
    assert not any([test.add(float(value), 1.0) for value in noise])
    rings = [test.add(float(value) + 2.0, 1.0) for value in noise[:200]]
    assert 20 < rings.index(True) < 80


def test_what_the_device_decided_is_what_is_found() -> None:
    watch = Watch(64)
    for step, loss in enumerate(losses(100), 1):
        watch.numbers(step, loss, 1.0, applied=True)
    limit = watch.limits().loss
    assert watch.numbers(101, limit * (1 + 1e-12), 1.0, applied=True) == []
    (spike,) = watch.numbers(102, limit * (1 - 1e-6), 1.0, applied=False)
    assert spike.series == "loss"
    found = watch.numbers(103, math.nan, math.nan, applied=False)
    assert [anomaly.series for anomaly in found] == ["loss", "grad_norm"]
    assert math.isfinite(watch.limits().loss)


def test_a_watch_that_is_saved_and_restored_goes_on_as_if_it_had_not_been() -> None:
    values = losses(400)
    values[350] = 8.0
    whole, first = Watch(64), Watch(64)
    expected = [whole.numbers(step, loss, 1 + loss) for step, loss in enumerate(values, 1)]
    found = [first.numbers(step, loss, 1 + loss) for step, loss in enumerate(values[:200], 1)]
    second = Watch(64)
    second.restore(json.loads(json.dumps(first.state())))
    rest = enumerate(values[200:], 201)
    found += [second.numbers(step, loss, 1 + loss) for step, loss in rest]
    assert found == expected and second.state() == whole.state()


def machine(seconds: list[float], data: float = 1e-3, memory: float = 1e8) -> list[Anomaly]:
    watch, found = MachineWatch(64), []
    for step, value in enumerate(seconds, 1):
        found += watch.step(step, value, data, memory)
    return found


def test_a_step_that_hangs_is_found_and_a_late_one_is_not() -> None:
    usual = [0.1 + 0.002 * (i % 5) for i in range(200)]
    assert machine(usual) == []
    usual[120] = 0.35  # another program ran
    assert machine(usual) == []
    usual[120] = 3.0
    (slow,) = machine(usual)
    assert (slow.step, slow.kind, slow.series) == (121, "slow", "step_seconds")


def test_a_machine_that_stays_slower_is_found_once() -> None:
    usual = [0.1 + 0.002 * (i % 5) for i in range(100)]
    slower = [0.45 + 0.002 * (i % 5) for i in range(30)]
    (slow,) = machine(usual + slower)
    assert slow.series == "step_seconds" and 101 <= slow.step <= 116


def test_data_that_comes_late_again_and_again_is_found() -> None:
    watch, found = MachineWatch(64), []
    for step in range(1, 140):
        found += watch.step(step, 0.1, 0.1 if step > 120 else 0.001, 1e8)
    assert found and found[0].series == "data_seconds" and found[0].step <= 125


def test_memory_that_grows_is_found() -> None:
    watch, found = MachineWatch(64), []
    for step in range(1, 100):
        found += watch.step(step, 0.1, 0.001, 1e8 if step < 80 else 1.4e8)
    assert [found[0].step, found[0].kind, found[0].series] == [80, "growth", "memory_bytes"]


def test_a_layer_whose_updates_grow_is_named() -> None:
    watch, found = MachineWatch(64), []
    for step in range(1, 100):
        ratio = 0.05 if step == 90 else 1e-3
        found += watch.layers(step, {"layer 0": 1e-3, "layer 1": ratio})
    (spike,) = found
    assert (spike.step, spike.series) == (90, "update_ratio of layer 1")
    assert spike.value == 0.05 and spike.usual == pytest.approx(1e-3)


def test_an_update_is_compared_with_the_one_before_it_so_that_a_trend_is_none() -> None:
    watch, found = Watch(64), []
    ratios = [math.exp(-i / 20) * (1 + 0.05 * (i % 3)) for i in range(200)]
    ratios[150] *= 30
    for step, ratio in enumerate(ratios, 1):
        found += watch.update(step, ratio)
    (spike,) = found
    assert (spike.step, spike.kind, spike.series) == (151, "spike", "update")
    assert spike.value == pytest.approx(30 * spike.usual, rel=0.2)


def test_updates_that_are_saved_and_restored_go_on_as_if_they_had_not_been() -> None:
    ratios = [0.01 * (1 + 0.05 * (i % 3)) for i in range(200)]
    ratios[120] = 0.5
    whole, first, second = Watch(64), Watch(64), Watch(64)
    expected = [whole.update(step, ratio) for step, ratio in enumerate(ratios, 1)]
    found = [first.update(step, ratio) for step, ratio in enumerate(ratios[:121], 1)]
    second.restore(json.loads(json.dumps(first.state())))
    found += [second.update(step, ratio) for step, ratio in enumerate(ratios[121:], 122)]
    assert found == expected and second.state() == whole.state()


def test_words_say_how_many_times_the_usual_unless_that_is_nothing() -> None:
    def words(kind: str, series: str, value: float, usual: float) -> str:
        return Anomaly(7, kind, series, value, usual).words()

    assert words("spike", "loss", 6.0, 2.0) == "loss 6, 3.0 times the usual 2"
    assert words("spike", "loss", 3.0, 2.0) == "loss 3, the usual is 2"
    assert words("slow", "data_seconds", 0.1, 0.0) == "data_seconds 0.1, the usual is 0"
    assert words("text", "text", 6.0, 2.0) == "text 6 nats per character, 3.0 times the usual 2"
    assert words("divergence", "loss", 3.0, 2.0) == "loss has been rising to 3, from 2"


def test_the_same_thing_is_noted_once_in_a_while() -> None:
    watch = Watch(64)
    said = [watch.is_new(Anomaly(step, "slow", "step_seconds", 2, 1)) for step in (1, 3, 10, 40)]
    assert said == [True, False, False, True]


def test_spikes_need_a_least_distance_where_values_hardly_vary() -> None:
    spikes = Spikes(64, score=7.0, least=0.15, relative=True)
    for _ in range(WARM):
        spikes.add(2.0, False)
    assert spikes.limit() == pytest.approx(2.3)
