"""A collector for OpenTelemetry on this machine, which decodes what it gets, or misbehaves."""

import gzip
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """What was received: spans and metrics as protobuf messages."""

    def __init__(self, status: int, delay_seconds: float) -> None:
        self.status, self.delay_seconds = status, delay_seconds
        self.refused: set[str] = set()  # paths
        self.spans: list = []
        self.metrics: list = []
        self.resources: list = []
        self.requests = 0

    def take(self, path: str, body: bytes) -> None:
        """Decode a request by its path, as OTLP over HTTP has them."""
        if path == "/v1/traces":
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.resources.append(resource.resource)
                for scope in resource.scope_spans:
                    self.spans += scope.spans
        elif path == "/v1/metrics":
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                for scope in resource.scope_metrics:
                    self.metrics += scope.metrics
        else:
            raise AssertionError(path)

    def named(self, name: str) -> list:
        return [span for span in self.spans if span.name == name]

    def children(self, span) -> list:
        return [child for child in self.spans if child.parent_span_id == span.span_id]


@contextmanager
def collector(status: int = 200, delay_seconds: float = 0.0) -> Iterator[tuple[str, Collector]]:
    """Its address and what it received; with another status it refuses, with a delay it is slow."""
    got = Collector(status, delay_seconds)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.requests += 1
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            time.sleep(got.delay_seconds)
            status = 404 if self.path in got.refused else got.status
            if status == 200:
                got.take(self.path, body)
            try:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
            except OSError:  # the run did not wait for the answer
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", got
    finally:
        server.shutdown()
        server.server_close()


def attributes(message) -> dict:
    """The attributes of a span, an event or a resource."""
    return {
        entry.key: getattr(entry.value, entry.value.WhichOneof("value"))
        for entry in message.attributes
    }
