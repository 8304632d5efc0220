"""Requests of many clients, computed by one thread.

submit    from any thread: a request waits in a queue of limited length
thread    lets requests into the batch of their model, advances the batches in turn, and reports
          each piece of text to whoever made the request
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tinyllama.errors import TinyllamaError
from tinyllama.generate.batch import Batch
from tinyllama.generate.completion import Completion, Made

__all__ = ["Busy", "Closed", "Engine", "Request"]


class Busy(Exception):
    """The queue is full."""


class Closed(Exception):
    """The engine is stopping."""


@dataclass(eq=False)
class Request:
    """A completion to make with the model of that name.

    `report` is called on the engine's thread: with each piece, and with None behind the last one,
    or with what went wrong: TinyllamaError, TimeoutError, Closed, RuntimeError.
    """

    model: str
    completion: Completion
    report: Callable[[Made | Exception | None], None]
    deadline: float = float("inf")  # of time.monotonic
    cancelled: threading.Event = field(default_factory=threading.Event)


class Engine:
    """The thread that owns the models' batches."""

    def __init__(self, batches: Mapping[str, Callable[[], Batch]], queue: int) -> None:
        """batches: makes the batch of a model, by name, when it is first needed. `queue` bounds
        the requests that wait."""
        self._make, self._limit = batches, queue
        self._batches: dict[str, Batch] = {}
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def computed(self) -> int:
        """Tokens that have gone through all models."""
        return sum(batch.computed for batch in [*self._batches.values()])

    @property
    def load(self) -> int:
        """Requests that wait or run."""
        return len(self._waiting) + len(self._running)

    def compile(self, name: str) -> None:
        """Compile all that requests for a model need, before the first of them comes."""
        with self._changed:
            self._batch(name).compile()

    def submit(self, requests: Sequence[Request]) -> None:
        """Let all requests wait. Raises Busy, and adds none, if they are too many, and Closed."""
        with self._changed:
            if self._closed:
                raise Closed("the server is stopping")
            if len(self._waiting) + len(requests) > self._limit:
                raise Busy(f"{len(self._waiting)} requests wait already")
            self._waiting += requests
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Compute nothing more for a request."""
        request.cancelled.set()
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """End the thread; what waits or runs is reported as Closed."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._wait():
            try:
                self._turn()
            except Exception as error:  # a mistake of ours, after which no request may wait forever
                self._fail({*self._make}, error, [*self._waiting])
        for request in [*self._running, *self._waiting]:
            request.report(Closed("the server is stopping"))

    def _wait(self) -> bool:
        """Wait for something to do; False once the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._closed)
            return not self._closed

    def _turn(self) -> None:
        """Let requests go and come, and make a token of each that runs."""
        with self._changed:
            self._drop_ended()
            self._admit()
        for name in {request.model for request in self._running}:
            try:
                pieces = self._batches[name].advance()
            except Exception as error:
                self._fail({name}, error)
            else:
                self._report(name, pieces)

    def _drop_ended(self) -> None:
        """Forget requests that were cancelled or are late."""
        now = time.monotonic()
        for request in [*self._waiting, *self._running]:
            if not request.cancelled.is_set() and now < request.deadline:
                continue
            if request in self._running:
                self._batches[request.model].drop(request.completion)
                self._running.remove(request)
            else:
                self._waiting.remove(request)
            if not request.cancelled.is_set():
                request.report(TimeoutError("the request took too long"))

    def _admit(self) -> None:
        """Begin those that wait, first come first, each as soon as its model has room."""
        full: set[str] = set()
        for request in [*self._waiting]:
            name = request.model
            if name in full:
                continue
            full.add(name)  # one prompt at a time, and in their order
            try:
                batch = self._batch(name)
                if not batch.has_room:
                    continue
                self._waiting.remove(request)
                self._running.append(request)
                batch.begin(request.completion)
            except Exception as error:
                self._fail({name}, error, [request])

    def _batch(self, name: str) -> Batch:
        if name not in self._batches:
            self._batches[name] = self._make[name]()
        return self._batches[name]

    def _report(self, name: str, pieces: Sequence[tuple[Completion, Made]]) -> None:
        """Give out what a model made. A pass may hold two tokens of a text, of its prompt's end and
        the next one, so the end of a text is reported when all pieces are."""
        requests = {id(r.completion): r for r in self._running if r.model == name}
        for completion, made in pieces:
            requests[id(completion)].report(made)
        for request in requests.values():
            if request.completion.finish_reason is not None:
                self._running.remove(request)
                request.report(None)

    def _fail(self, names: set[str], error: Exception, waiting: Sequence[Request] = ()) -> None:
        """End what these models compute, and these requests that wait, with an error. Batches may
        be in any state, so new ones are made for the next requests."""
        if not isinstance(error, TinyllamaError):
            traceback.print_exception(error)
            error = RuntimeError(f"the model failed: {type(error).__name__}")
        failed = [request for request in self._running if request.model in names]
        with self._changed:
            failed += [request for request in waiting if request in self._waiting]
            self._waiting = deque(r for r in self._waiting if r not in failed)
        self._running = [r for r in self._running if r not in failed]
        for name in names:
            self._batches.pop(name, None)
        for request in failed:
            request.report(error)
