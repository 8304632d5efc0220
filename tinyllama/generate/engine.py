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
        return sum(batch.computed for batch in self._batches.values())

    @property
    def load(self) -> int:
        """Requests that wait or run."""
        return len(self._waiting) + len(self._running)

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
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._closed):
                    self._changed.wait()
                if self._closed:
                    break
                self._drop_ended()
                self._admit()
            for name in {request.model for request in self._running}:
                self._advance(name)
        for request in [*self._running, *self._waiting]:
            request.report(Closed("the server is stopping"))

    def _drop_ended(self) -> None:
        """Forget requests that were cancelled or are late."""
        now = time.monotonic()
        for request in [*self._waiting, *self._running]:
            if not request.cancelled.is_set() and now < request.deadline:
                continue
            if request in self._running:
                self._running.remove(request)
                self._batches[request.model].drop(request.completion)
            else:
                self._waiting.remove(request)
            if not request.cancelled.is_set():
                request.report(TimeoutError("the request took too long"))

    def _admit(self) -> None:
        """Begin those that wait, first come first, each as soon as its model has room."""
        full: set[str] = set()
        for request in [*self._waiting]:
            if request.model in full:
                continue
            try:
                batch = self._batch(request.model)
            except (TinyllamaError, MemoryError) as error:
                self._waiting.remove(request)
                request.report(error if isinstance(error, TinyllamaError) else _failure(error))
                continue
            if batch.has_room:
                self._waiting.remove(request)
                self._running.append(request)
                batch.begin(request.completion)
            full.add(request.model)  # one prompt at a time, and in their order

    def _batch(self, name: str) -> Batch:
        if name not in self._batches:
            self._batches[name] = self._make[name]()
        return self._batches[name]

    def _advance(self, name: str) -> None:
        requests = {id(r.completion): r for r in self._running if r.model == name}
        try:
            pieces = self._batches[name].advance()
        except Exception as error:
            # The batch may be in any state, so a new one is made for the next request.
            if not isinstance(error, TinyllamaError):
                traceback.print_exc()
            del self._batches[name]
            for request in requests.values():
                self._running.remove(request)
                request.report(error if isinstance(error, TinyllamaError) else _failure(error))
            return
        for completion, made in pieces:
            request = requests[id(completion)]
            request.report(made)
            if completion.finish_reason is not None:
                self._running.remove(request)
                request.report(None)


def _failure(error: BaseException) -> RuntimeError:
    """What a client sees of our own mistakes; the traceback is the server's."""
    return RuntimeError(f"the model failed: {type(error).__name__}")
