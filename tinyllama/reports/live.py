"""A report that follows a run: a page on 127.0.0.1 which asks for new numbers every two seconds.

/            the page
/data.json?R  what its charts draw, read again from the run; of revision R nothing but its name
"""

import json
import sys
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tinyllama.errors import ConfigError, TinyllamaError, reason
from tinyllama.observe.samples import SAMPLES
from tinyllama.reports.page import data, elements, page, sections
from tinyllama.reports.runs import CEILINGS, PROFILE, Run, named_apart, read_run
from tinyllama.train.run_folder import METRICS

HOST = "127.0.0.1"


_FILES = (METRICS, SAMPLES, PROFILE, CEILINGS)


class Followed:
    """Runs that go on, as a page wants them. One that has not made its first step is one too."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Raises CheckpointError where a folder is no run's."""
        self._folders, self._lock = folders, threading.Lock()
        self._seen: list[object] = []
        self._revision = ""
        self.runs()

    def runs(self) -> list[Run]:
        """The runs as they are now. Raises CheckpointError."""
        return named_apart([read_run(folder, begun=True) for folder in self._folders])

    def page(self) -> str:
        """The page. Raises CheckpointError."""
        return page(self.runs(), live=True)

    def data(self, known: str) -> str:
        """What the page draws; the name of the revision alone where that is `known`. Where a run
        cannot be read now, since somebody moved it, an object with that `problem`."""
        with self._lock:  # pages in two windows read the same files once
            if known and known == self._revision and self._stamps() == self._seen:
                return as_json({"revision": known})
            seen = self._stamps()
            try:
                runs = self.runs()
            except (TinyllamaError, OSError) as error:
                return as_json({"problem": str(error)})
            content = data(runs, live=True)
            self._seen, self._revision = seen, content["revision"]
        if known == content["revision"]:
            return as_json({"revision": known})
        return as_json(content | {"sections": sections(runs), "elements": elements(runs)})

    def _stamps(self) -> list[object]:
        """What changes when a run writes something."""
        return [_stamp(folder / name) for folder in self._folders for name in ("", *_FILES)]


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


class Live:
    """Serves a report until `close`; `page`, and `data` of a known revision, make what is served,
    as text."""

    def __init__(self, port: int, page: Callable[[], str], data: Callable[[str], str]) -> None:
        """`port` 0 takes a free one. Raises ConfigError where the port is taken."""
        made: dict[str, tuple[str, Callable[[str], str]]] = {
            "/": ("text/html; charset=utf-8", lambda _: page()),
            "/data.json": ("application/json", data),
        }

        class Handler(BaseHTTPRequestHandler):
            """Answers GET for the two paths, and only under the name of this machine."""

            def do_GET(self) -> None:
                path, _, known = self.path.partition("?")
                if path not in made:
                    return self._answer(404, "text/plain", "no such page\n")
                # A page elsewhere that points its own name here must not read the run.
                if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):
                    return self._answer(403, "text/plain", "ask for 127.0.0.1\n")
                kind, make = made[path]
                try:
                    text = make(known)
                except (TinyllamaError, OSError) as error:
                    return self._answer(500, "text/plain; charset=utf-8", f"{error}\n")
                self._answer(200, kind, text)

            def _answer(self, status: int, kind: str, text: str) -> None:
                content = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        try:
            self._server = _Server((HOST, port), Handler)
        except OSError as error:
            raise ConfigError(f"--port {port}: {reason(error)}: choose another one") from None
        self.url = f"http://{HOST}:{self._server.server_address[1]}/"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Serve until the process is interrupted."""
        self._thread.join()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    """One thread per request."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that went away before it had its answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def as_json(content: object) -> str:
    """JSON as browsers read it."""
    return json.dumps(content, allow_nan=False)
