"""Traces and metrics of a run for an OpenTelemetry collector, by OTLP over HTTP.

    run > epoch > step > data, forward and backward, update, validate, save

Spans end up in a queue of the SDK, which another thread sends. The run never waits for it: where
the collector is down, slow, or refuses, spans are dropped and counted, and one line says so. Only
the end of a run waits, for FLUSH_SECONDS at most, and not for a collector that is silent already.

Where the passes forward and back end and the update begins is known from the times of the kernels
(runtime/timing.py). On the CPU they cost next to nothing and are always recorded; on a GPU only
with observe.otlp_operations_every, and otherwise one span stands for both.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from tinyllama.config import Config
from tinyllama.errors import ConfigError
from tinyllama.runtime.recording import recording
from tinyllama.runtime.timing import Kernel, Recorder, Run
from tinyllama.system import device
from tinyllama.version import __version__

FLUSH_SECONDS = 2.0
METRICS_SECONDS = 5.0
INSTALL = "pip install 'tinyllama-trainer[otel]'"
_UPDATE = "tinyllama/train/optimizer.py:"
_PASSES, _UPDATING = "forward and backward", "update"
# Metrics by the name that a line of metrics.jsonl has for them: name and unit for the collector.
GAUGES = {
    "loss": ("tinyllama.loss", "nat/token"),
    "val_loss": ("tinyllama.validation.loss", "nat/token"),
    "lr": ("tinyllama.learning_rate", "1"),
    "grad_norm": ("tinyllama.gradient.norm", "1"),
    "tokens_per_second": ("tinyllama.throughput", "token/s"),
    "memory_bytes": ("tinyllama.memory", "By"),
}

Attributes = Mapping[str, str | int | float | bool]


class Tracing:
    """What a run says to a collector. This one says nothing: the base of `OtlpTracing`."""

    dropped = 0  # spans that did not reach the collector

    def span(self, name: str, **attributes: Any) -> AbstractContextManager[None]:
        """A span within the one that is open."""
        return nullcontext()

    def epoch(self, number: int) -> None:
        """From here on steps belong to this epoch."""

    def event(self, name: str, **attributes: Any) -> None:
        """An event of the span that is open: a checkpoint, a signal, an anomaly."""

    def passes(self, step: int, begin: float, end: float) -> None:
        """Spans of what a step computed between two times of `time.perf_counter`."""

    def metrics(self, line: Mapping[str, Any]) -> None:
        """The values of a line of metrics."""


@contextmanager
def tracing(config: Config, say: Callable[[str], None]) -> Iterator[Tracing]:
    """The tracing that a configuration, or else OTEL_EXPORTER_OTLP_ENDPOINT, switches on.

    The steps of a run must be built within. Raises ConfigError where the configuration names a
    collector and the SDK is not installed; for the variable, `say` says so.
    """
    observe = config.observe
    endpoint = observe.otlp_endpoint or device.otlp_endpoint()
    if endpoint is None:
        yield Tracing()
        return
    try:
        import opentelemetry.exporter.otlp.proto.http
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError:
        missing = f"the OpenTelemetry SDK is not installed: {INSTALL}"
        if observe.otlp_endpoint is not None:
            raise ConfigError(f"{config.where('observe.otlp_endpoint')}: {missing}") from None
        say(f"OTEL_EXPORTER_OTLP_ENDPOINT: {missing}")
        yield Tracing()
        return
    every = observe.otlp_operations_every
    with ExitStack() as stack:
        records = every is not None or device.is_cpu()
        recorder = stack.enter_context(recording()) if records else None
        tracer = OtlpTracing(endpoint, recorder, every, say)
        stack.callback(tracer.close)
        with tracer.span("run", **_described(config)):
            try:
                yield tracer
            finally:
                tracer.end_epoch()


def _described(config: Config) -> dict[str, Any]:
    """What the span of a run says of it."""
    t = config.training
    form = "qlora" if config.qlora else "lora" if config.lora else "full"
    return {
        "tinyllama.version": __version__,
        "tinyllama.form": form,
        "tinyllama.dtype": t.dtype,
        "tinyllama.batch_size": t.batch_size,
        "tinyllama.context_length": config.context_length,
        "tinyllama.checkpoint_dir": config.checkpointing.checkpoint_dir,
    }


class OtlpTracing(Tracing):
    """Spans and metrics by OpenTelemetry's SDK."""

    def __init__(
        self,
        endpoint: str,
        recorder: Recorder | None,
        every: int | None,
        say: Callable[[str], None],
    ) -> None:
        """`every` is the number of steps between those with a span per operation."""
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource

        self.endpoint, self.recorder, self.every, self.say = endpoint, recorder, every, say
        self._ended = self._sent = 0
        self._noted: set[str] = set()
        self._refuses_metrics = False
        self._request_began: float | None = None  # of the request that has no answer yet
        self._epoch = ExitStack()
        # The clock of spans is that of the day, in nanoseconds.
        self._offset = time.time_ns() - time.perf_counter_ns()
        ours = Resource({"service.name": "tinyllama", "service.version": __version__})
        # What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say wins over that.
        resource = Resource.create().merge(ours).merge(OTELResourceDetector().detect())
        _silence()
        self._open_spans(resource)
        self._open_metrics(resource)

    @property
    def dropped(self) -> int:  # type: ignore[override]
        """Spans that ended and did not reach the collector so far."""
        return self._ended - self._sent

    def _open_spans(self, resource: Any) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
        from opentelemetry.sdk.trace.export import (
            BatchSpanProcessor,
            SpanExporter,
            SpanExportResult,
        )

        tracing, inner = self, OTLPSpanExporter(f"{self.endpoint.rstrip('/')}/v1/traces")

        class Counting(SpanExporter):
            """The exporter, whose failures are counted and said once."""

            def export(self, spans: Sequence[Any]) -> Any:
                tracing._request_began = time.monotonic()
                result = tracing._guarded(inner.export, spans)
                tracing._request_began = None
                if result is SpanExportResult.SUCCESS:
                    tracing._sent += len(spans)
                    tracing._note_metrics()
                else:
                    tracing._note()
                return result or SpanExportResult.FAILURE

            def shutdown(self) -> None:
                inner.shutdown()  # type: ignore[no-untyped-call]

        class Ended(SpanProcessor):
            """Counts the spans that have ended."""

            def on_end(self, span: Any) -> None:
                tracing._ended += 1

        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(Ended())
        self._provider.add_span_processor(
            BatchSpanProcessor(Counting(), schedule_delay_millis=1000)
        )
        self._tracer = self._provider.get_tracer("tinyllama", __version__)

    def _open_metrics(self, resource: Any) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import (
            MetricExportResult,
            PeriodicExportingMetricReader,
        )

        tracing = self

        class Noting(OTLPMetricExporter):
            """The exporter, whose failures are noted."""

            def export(self, *args: Any, **options: Any) -> Any:
                result = tracing._guarded(super().export, *args, **options)
                tracing._refuses_metrics |= result is not MetricExportResult.SUCCESS
                return result or MetricExportResult.FAILURE

        exporter = Noting(f"{self.endpoint.rstrip('/')}/v1/metrics")
        reader = PeriodicExportingMetricReader(
            exporter, export_interval_millis=1000 * METRICS_SECONDS
        )
        self._meters = MeterProvider([reader], resource, shutdown_on_exit=False)
        meter = self._meters.get_meter("tinyllama", __version__)
        self._gauges = {key: meter.create_gauge(name, unit) for key, (name, unit) in GAUGES.items()}

    def _guarded(self, export: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What an exporter returns; None where it raises, whatever that is: no run ends by it."""
        try:
            return export(*args, **options)
        except Exception:
            return None

    def _note(self, what: str = "spans") -> None:
        """Say once that the collector does not take what is sent."""
        if what not in self._noted:
            self._noted.add(what)
            self.say(f"{self.endpoint} takes no {what}: they are dropped, and the run goes on")

    def _note_metrics(self) -> None:
        """Say so where the collector takes spans and no metrics; where it takes neither, the notice
        about spans says it all."""
        if self._refuses_metrics and not self._noted:
            self._note("metrics")

    @contextmanager
    def span(self, name: str, **attributes: Any) -> Iterator[None]:
        """A span within the one that is open."""
        with self._tracer.start_as_current_span(name, attributes=attributes):
            yield

    def epoch(self, number: int) -> None:
        """From here on steps belong to this epoch."""
        self.end_epoch()
        self._epoch.enter_context(self.span("epoch", **{"tinyllama.epoch": number}))

    def end_epoch(self) -> None:
        """End the span of the epoch, before that of the run."""
        self._epoch.close()

    def event(self, name: str, **attributes: Any) -> None:
        """An event of the span that is open."""
        from opentelemetry import trace

        trace.get_current_span().add_event(name, attributes)

    def passes(self, step: int, begin: float, end: float) -> None:
        """Spans of what a step computed: the two passes, the update, and in steps of
        observe.otlp_operations_every one for each kernel."""
        sampled = self.every is not None and step % self.every == 0
        runs = [] if self.recorder is None else self.recorder.take(None if sampled else _updates)
        update = next((run.begin for run in runs if _updates(run.kernel)), None)
        if update is None:
            with self._past(f"{_PASSES}, {_UPDATING}", begin, end):
                self._operations(runs if sampled else [])
            return
        for name, first, last in ((_PASSES, begin, update), (_UPDATING, update, end)):
            with self._past(name, first, last):
                self._operations([r for r in runs if sampled and first <= r.begin < last])

    @contextmanager
    def _past(self, name: str, begin: float, end: float, **attributes: Any) -> Iterator[None]:
        """A span between two times of `time.perf_counter`."""
        started = self._nanoseconds(begin)
        from opentelemetry import trace

        span = self._tracer.start_span(name, start_time=started, attributes=attributes)
        with trace.use_span(span, end_on_exit=False):
            yield
        span.end(self._nanoseconds(end))

    def _operations(self, runs: Sequence[Run]) -> None:
        for run in runs:
            kernel = run.kernel
            attributes = {
                "code.source": ", ".join(kernel.lines),
                "tinyllama.pass": "backward" if kernel.is_backward else "forward",
                "tinyllama.flops": kernel.flops,
                "tinyllama.bytes": kernel.nbytes,
            }
            with self._past(kernel.name, run.begin, run.end, **attributes):
                pass

    def _nanoseconds(self, seconds: float) -> int:
        return round(seconds * 1e9) + self._offset

    def metrics(self, line: Mapping[str, Any]) -> None:
        """The values of a line of metrics."""
        for key, gauge in self._gauges.items():
            if line.get(key) is not None:
                gauge.set(line[key])

    def close(self) -> None:
        """Send what is left; it may take FLUSH_SECONDS, less what a request has waited already."""

        def finish() -> None:
            self._guarded(self._provider.shutdown)
            self._guarded(self._meters.shutdown, timeout_millis=1000 * FLUSH_SECONDS)

        # A thread that Python does not wait for: a collector may keep a request open for minutes.
        began = self._request_began
        waited = 0.0 if began is None else time.monotonic() - began
        thread = threading.Thread(target=finish, name="traces", daemon=True)
        thread.start()
        thread.join(max(0.0, FLUSH_SECONDS - waited))
        if self.dropped:
            self._note()
        self._note_metrics()


def _updates(kernel: Kernel) -> bool:
    """Whether a kernel belongs to the optimizer's update."""
    return bool(kernel.lines) and kernel.lines[0].startswith(_UPDATE)


def _silence() -> None:
    """What the SDK logs about a collector is said by us, once."""
    import logging

    logger = logging.getLogger("opentelemetry")
    logger.propagate = False
    logger.addHandler(logging.NullHandler())
