"""Traces of a run as a collector gets them, and runs that no collector slows, stops or changes."""

import itertools
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from otlp_collector import attributes, collector
from runs_helpers import VAL_FILES, configuration, environment, metrics, train

from tinyllama.errors import ConfigError
from tinyllama.observe import trace
from tinyllama.observe.anomalies import Anomaly, Watch
from tinyllama.observe.trace import FLUSH_SECONDS, GAUGES, Tracing, tracing
from tinyllama.train import trainer as trainer_module

STEPS = 4


def traced(run: Path, endpoint: str, *overrides: str):
    """A short run with its spans sent to `endpoint`: its tracing, and what was said."""
    said: list[str] = []
    config = configuration(
        run,
        f"training.max_steps={STEPS}",
        "checkpointing.save_every=2",
        f"data.val_path={VAL_FILES!r}",
        "training.eval_every=2",
        f'observe.otlp_endpoint="{endpoint}"',
        *overrides,
    )
    with tracing(config, said.append) as traces:
        outcome = train(config, tracing=traces)
    assert outcome.finished
    return traces, said


def losses(run: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in metrics(run).values()]


@pytest.fixture(scope="module")
def received(tmp_path_factory):
    """What a collector got of a run whose every other step has a span per operation."""
    run = tmp_path_factory.mktemp("traced") / "run"
    with collector() as (endpoint, got):
        traces, said = traced(run, endpoint, "observe.otlp_operations_every=2")
        time.sleep(0.2)
    return got, traces, said, run


def test_spans_are_nested_as_the_run_is(received):
    got, traces, said, _ = received
    (run,) = got.named("run")
    assert not run.parent_span_id and not said and traces.dropped == 0
    (epoch,) = got.named("epoch")
    assert epoch.parent_span_id == run.span_id
    assert epoch.end_time_unix_nano <= run.end_time_unix_nano
    steps = got.children(epoch)
    assert [step.name for step in steps if step.name == "step"] == ["step"] * STEPS
    numbers = [attributes(s)["tinyllama.step"] for s in steps if s.name == "step"]
    assert sorted(numbers) == [1, 2, 3, 4]
    for step in got.named("step"):
        names = [child.name for child in got.children(step)]
        number = attributes(step)["tinyllama.step"]
        expected = ["data", "forward and backward", "update"]
        expected += ["validate"] * (number % 2 == 0) + ["save"] * (number == 2)
        assert sorted(names) == sorted(expected), number
    assert attributes(got.resources[0])["service.name"] == "tinyllama"
    assert attributes(run)["tinyllama.form"] == "full"


def test_times_of_a_steps_parts_follow_each_other_within_it(received):
    got, *_ = received
    for step in got.named("step"):
        parts = {child.name: child for child in got.children(step)}
        order = [parts[name] for name in ("data", "forward and backward", "update")]
        slack = 1_000_000  # a millisecond: the clock of the day may be adjusted
        assert step.start_time_unix_nano <= order[0].start_time_unix_nano
        for earlier, later in itertools.pairwise(order):
            assert earlier.end_time_unix_nano <= later.start_time_unix_nano + slack
        assert all(p.end_time_unix_nano > p.start_time_unix_nano for p in order)
        assert order[-1].end_time_unix_nano <= step.end_time_unix_nano + slack


def test_sampled_steps_have_a_span_per_kernel_with_the_line_that_asked_for_it(received):
    got, *_ = received
    for step in got.named("step"):
        is_sampled = attributes(step)["tinyllama.step"] % 2 == 0
        passes, update = (
            next(c for c in got.children(step) if c.name == name)
            for name in ("forward and backward", "update")
        )
        kernels = got.children(passes)
        assert bool(kernels) is is_sampled
        if not is_sampled:
            continue
        sources = [attributes(kernel)["code.source"] for kernel in kernels]
        assert all("tinyllama/" in source for source in sources)
        directions = {attributes(kernel)["tinyllama.pass"] for kernel in kernels}
        assert directions == {"forward", "backward"}
        assert all("adamw" in k.name or "square_sum" in k.name or k.name[0] in "rE"
                   for k in got.children(update))  # fmt: skip


def test_events_name_the_checkpoints(received):
    got, _, _, run = received
    events = [event for span in got.named("save") for event in span.events]
    folders = {attributes(event)["tinyllama.folder"] for event in events}
    assert {event.name for event in events} == {"checkpoint"}
    assert folders == {str(run / "step-00000002"), str(run / "final")}


def test_a_signal_is_an_event_of_the_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "stopping_on_signals", lambda *_: nullcontext(lambda: 130))
    with collector() as (endpoint, got):
        config = configuration(tmp_path / "run", f'observe.otlp_endpoint="{endpoint}"')
        with tracing(config, print) as traces:
            assert train(config, tracing=traces).exit_code == 130
    (event,) = [event for span in got.named("run") for event in span.events]
    assert (event.name, attributes(event)["tinyllama.exit_code"]) == ("signal", 130)


def test_metrics_are_those_of_metrics_jsonl(received):
    got, _, _, run = received
    last = metrics(run)[STEPS]
    newest = {m.name: m.gauge.data_points[-1].as_double for m in got.metrics}
    for key, (name, _) in GAUGES.items():
        point = next(m for m in reversed(got.metrics) if m.name == name).gauge.data_points[-1]
        value = getattr(point, point.WhichOneof("value"))
        assert value == pytest.approx(last[key]), (key, newest)


def test_losses_are_bitwise_those_of_a_run_without_traces(received, tmp_path):
    *_, run = received
    plain = configuration(tmp_path / "plain", f"training.max_steps={STEPS}")
    train(plain)
    assert losses(run) == losses(tmp_path / "plain")


@pytest.mark.parametrize("kind", ["down", "refusing", "slow"])
def test_a_bad_collector_is_one_notice_and_spans_that_are_dropped(kind, tmp_path, received):
    *_, plain = received
    if kind == "down":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        begun = time.monotonic()
        traces, said = traced(tmp_path / "run", endpoint)
    else:
        options = {"status": 400} if kind == "refusing" else {"delay_seconds": 20.0}
        with collector(**options) as (endpoint, _):
            begun = time.monotonic()
            traces, said = traced(tmp_path / "run", endpoint)
    assert time.monotonic() - begun < 20 * 0.9
    assert traces.dropped > STEPS
    assert losses(tmp_path / "run") == losses(plain)
    (notice,) = said
    assert endpoint in notice and "dropped" in notice


def test_the_end_of_a_run_waits_for_a_slow_collector_two_seconds_at_most():
    with collector(delay_seconds=20.0) as (endpoint, got):
        traces = trace.OtlpTracing(endpoint, None, None, lambda _: None)
        with traces.span("run"):
            pass
        begun = time.monotonic()
        traces.close()
        seconds = time.monotonic() - begun
        assert seconds < FLUSH_SECONDS + 0.5 and got.requests


def test_the_end_of_a_run_does_not_wait_for_a_collector_that_has_been_silent_for_long():
    with collector(delay_seconds=20.0) as (endpoint, got):
        traces = trace.OtlpTracing(endpoint, None, None, lambda _: None)
        with traces.span("run"):
            pass
        deadline = time.monotonic() + 10
        while not got.requests:
            assert time.monotonic() < deadline, "no request came"
            time.sleep(0.05)
        time.sleep(FLUSH_SECONDS)
        begun = time.monotonic()
        traces.close()
        assert time.monotonic() - begun < 0.5
    assert traces.dropped == 1


def test_without_the_sdk_an_endpoint_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    config = configuration(tmp_path / "run", 'observe.otlp_endpoint="http://127.0.0.1:1"')
    with pytest.raises(
        ConfigError, match=r"otlp_endpoint.*pip install 'tinyllama-trainer\[otel\]'"
    ):
        with tracing(config, lambda _: None):
            pass
    said: list[str] = []
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    with tracing(configuration(tmp_path / "run"), said.append) as traces:
        assert type(traces) is Tracing
    assert len(said) == 1 and "pip install" in said[0]


def test_a_run_without_an_endpoint_imports_no_sdk():
    code = (
        "import sys; from tinyllama.config import Config; from tinyllama.observe.trace import *\n"
        "with tracing(Config(), print) as t: pass\n"
        "print(type(t).__name__, any(m.startswith('opentelemetry') for m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert done.stdout.split() == ["Tracing", "False"], done.stderr


def test_the_variable_of_all_programs_switches_traces_on(tmp_path, monkeypatch):
    with collector() as (endpoint, got):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        config = configuration(tmp_path / "run", "training.max_steps=1")
        with tracing(config, print) as traces:
            train(config, tracing=traces)
    assert len(got.named("step")) == 1


def test_the_variables_of_the_sdk_name_the_service(tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "night runs")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    with collector() as (endpoint, got):
        traced(tmp_path / "run", endpoint)
    resource = attributes(got.resources[0])
    assert (resource["service.name"], resource["deployment.environment"]) == ("night runs", "test")
    assert resource["service.version"]


def test_an_anomaly_is_an_event_of_its_step_with_what_metrics_jsonl_says(tmp_path, monkeypatch):
    found = [Anomaly(3, "spike", "loss", 9.0, 5.0)]
    monkeypatch.setattr(
        Watch, "numbers", lambda self, step, *_: found if step == 3 else [], raising=True
    )
    with collector() as (endpoint, got):
        traced(tmp_path / "run", endpoint)
    (event,) = [e for step in got.named("step") for e in step.events if e.name == "anomaly"]
    said = attributes(event)
    (entry,) = metrics(tmp_path / "run")[3]["anomalies"]
    assert (said["tinyllama.series"], said["tinyllama.value"]) == ("loss", 9.0)
    assert (said["tinyllama.kind"], said["tinyllama.action"]) == ("spike", "note")
    documents = [value.string_value for value in said["tinyllama.documents"].values]
    assert documents == entry["documents"] != []


def spans_and_metrics(traces: trace.OtlpTracing, *, metrics_first: bool) -> None:
    """Send a span and a metric now."""
    with traces.span("run"):
        traces.metrics({"loss": 1.0})
    both = [traces._provider.force_flush, traces._meters.force_flush]
    for flush in reversed(both) if metrics_first else both:
        flush()


def test_a_collector_that_dies_while_a_run_goes_on_is_one_notice():
    said: list[str] = []
    with collector() as (endpoint, got):
        traces = trace.OtlpTracing(endpoint, None, None, said.append)
        spans_and_metrics(traces, metrics_first=False)
        assert got.named("run") and got.metrics and not said
        got.status = 400
        for _ in range(2):
            spans_and_metrics(traces, metrics_first=True)
        traces.close()
    assert said == [f"{endpoint} takes no spans: they are dropped, and the run goes on"]
    assert traces.dropped == 2


def test_a_collector_that_takes_spans_alone_is_one_notice_about_metrics():
    said: list[str] = []
    with collector() as (endpoint, got):
        got.refused = {"/v1/metrics"}
        traces = trace.OtlpTracing(endpoint, None, None, said.append)
        for _ in range(2):
            spans_and_metrics(traces, metrics_first=True)
        traces.close()
    assert said == [f"{endpoint} takes no metrics: they are dropped, and the run goes on"]
    assert traces.dropped == 0 and len(got.named("run")) == 2
