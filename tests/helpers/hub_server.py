"""A small server that speaks the endpoints of a model hub that downloads use, for tests.

    HEAD, GET /OWNER/NAME/resolve/REVISION/FILE    with ETag, X-Repo-Commit and Range
    HEAD, GET /datasets/OWNER/NAME/resolve/...     the same
    GET /api/datasets/OWNER/NAME/tree/REVISION     the names of its files

A repository may be gated or private (401), be slow to end (a download is cut), and counts what is
asked of it.
"""

import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Repository:
    """Files by revision ("main", a tag); each revision is one commit."""

    revisions: dict
    refusal: str | None = None  # "GatedRepo" or "RepoNotFound"
    cut_after: int | None = None  # bytes of the first GET of a large file
    requests: list = field(default_factory=list)

    def commit(self, revision):
        return hashlib.sha1(repr(sorted(self.revisions[revision])).encode()).hexdigest()

    def find(self, revision):
        """(commit, files) of a branch, a tag or a commit; None if there is none."""
        for name, files in self.revisions.items():
            if revision in (name, self.commit(name)):
                return self.commit(name), files
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def log_message(self, *args):
        pass

    def answer(self, body):
        parts = self.path.partition("?")[0].lstrip("/").split("/")
        if parts[0] == "api":
            return self.tree("/".join(parts[1:4]), parts[4:])
        prefix = ["datasets/"] if parts[0] == "datasets" else []
        parts = parts[len(prefix) :]
        repository = self.server.repositories.get("".join(prefix) + "/".join(parts[:2]))
        if repository is None or parts[2:3] != ["resolve"]:
            return self.refuse(401, "RepoNotFound")
        file = "/".join(parts[4:])
        repository.requests.append((self.command, file, self.headers.get("Range")))
        if repository.refusal:
            return self.refuse(
                403 if repository.refusal == "GatedRepo" else 401, repository.refusal
            )
        found = repository.find(parts[3])
        if found is None:
            return self.refuse(404, "RevisionNotFound")
        commit, files = found
        if file not in files:
            return self.refuse(404, "EntryNotFound", commit)
        return self.send(repository, commit, files[file], body)

    def tree(self, name, parts):
        """The names of a data set's files."""
        repository = self.server.repositories.get(name)
        found = repository and repository.find(parts[1])
        if not found or parts[:1] != ["tree"]:
            return self.refuse(401, "RepoNotFound")
        listed = [
            {"type": "file", "path": file, "size": len(data), "oid": "0" * 40}
            for file, data in found[1].items()
        ]
        data = json.dumps(listed).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status, code, commit=None):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, repository, commit, data, body):
        start, asked = 0, self.headers.get("Range")
        if asked:
            start = int(asked.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if not body:
            return
        cut = repository.cut_after
        if cut is not None and not asked and len(data) > cut:
            repository.cut_after = None
            self.wfile.write(data[:cut])
            self.wfile.flush()
            self.close_connection = True
        else:
            self.wfile.write(data[start:])


@contextmanager
def serve(repositories):
    """The address of a server of these repositories (name -> Repository), while in the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories = repositories
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def files_of(folder):
    """What a folder holds, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
