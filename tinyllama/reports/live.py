"""A report that follows a run: a page on 127.0.0.1 which asks for new numbers every two seconds.

/            the page           /data.json    what its charts draw, read again from the run
"""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tinyllama.errors import ConfigError, TinyllamaError, reason

HOST = "127.0.0.1"


class Live:
    """Serves a report until `close`; `page` and `data` make what is served, as text."""

    def __init__(self, port: int, page: Callable[[], str], data: Callable[[], str]) -> None:
        """`port` 0 takes a free one. Raises ConfigError where the port is taken."""
        made = {
            "/": ("text/html; charset=utf-8", page),
            "/data.json": ("application/json", data),
        }

        class Handler(BaseHTTPRequestHandler):
            """Answers GET for the two paths, and only under the name of this machine."""

            def do_GET(self) -> None:
                if self.path not in made:
                    return self._answer(404, "text/plain", "no such page\n")
                # A page elsewhere that points its own name here must not read the run.
                if self.headers.get("Host", "").rpartition(":")[0] not in (HOST, "localhost"):
                    return self._answer(403, "text/plain", "ask for 127.0.0.1\n")
                kind, make = made[self.path]
                try:
                    self._answer(200, kind, make())
                except TinyllamaError as error:
                    self._answer(500, "text/plain", f"{error}\n")

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
            self._server = ThreadingHTTPServer((HOST, port), Handler)
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


def as_json(content: object) -> str:
    """JSON as browsers read it."""
    return json.dumps(content, allow_nan=False)
