"""OpenAI's interface over HTTP, and a page to chat with.

    GET  /                       the page (page.html)
    GET  /health                 {"status": "ok"}
    GET  /v1/models              the model and its adapters
    POST /v1/completions         a prompt continued
    POST /v1/chat/completions    a conversation answered

A browser sends requests to 127.0.0.1 for any page that it shows. So a request is answered only if
its Host is an address, localhost or a name that was allowed (a page whose name was pointed at this
machine has its own name there: DNS rebinding), and its Origin, if it has one, is this server or was
allowed.
"""

import asyncio
import hmac
import ipaddress
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tinyllama.errors import ConfigError, DataError, TokenizerError
from tinyllama.generate import engine, protocol
from tinyllama.generate.completion import Completion, Made
from tinyllama.generate.engine import Busy, Closed, Engine
from tinyllama.generate.protocol import AnyWanted, ChatWanted, CompletionWanted, Form, Wanted
from tinyllama.generate.sampling import Sampling
from tinyllama.tokenizers.templates import ChatTemplate
from tinyllama.tokenizers.tokenizer import Tokenizer

BODY_SECONDS = 30.0  # a request must have been sent within this time
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, where a request for a completion has no limit
NO_SCRIPTS_OF_OTHERS = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """What the server allows. `models`: their names, the first of which is the default."""

    models: Sequence[str]
    length: int
    sampling: Sampling
    stop: Sequence[str] = ()
    max_new_tokens: int | None = None
    template: ChatTemplate | None = None
    api_key: str | None = None
    hosts: frozenset[str] = frozenset()
    origins: tuple[str, ...] = ()
    body_bytes: int = 4 << 20
    seconds: float = 600.0
    created: int = field(default_factory=lambda: int(time.time()))


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers

    def response(self) -> Response:
        """The error as OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 429 else "server_error"
        body = protocol.error(str(self), kind, self.code)
        return JSONResponse(body, self.status, headers=self.headers)


def _refusal(error: Exception) -> Refused:
    """The status of an error that a completion ended with."""
    if isinstance(error, TimeoutError):
        return Refused(504, str(error), "timeout")
    if isinstance(error, Closed):
        return Refused(503, str(error), "stopping")
    return Refused(500, str(error), "model_error")


class Server:
    """The application; `app` is what an ASGI server runs."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, settings: Settings) -> None:
        self._engine, self._tokenizer, self._settings = engine, tokenizer, settings
        routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        guards = [Middleware(_Guard, settings)]
        if settings.origins:
            allowed: dict[str, Any] = {"allow_origins": settings.origins}
            allowed |= {"allow_methods": ("GET", "POST"), "allow_headers": ["*"]}
            guards.append(Middleware(CORSMiddleware, **allowed))
        guards.append(Middleware(_Key, settings.api_key))
        handlers: Any = {Refused: _refuse, 404: _unknown, 405: _unknown}
        self.app = Starlette(routes=routes, middleware=guards, exception_handlers=handlers)

    async def _page(self, request: Request) -> Response:
        page = files("tinyllama.generate").joinpath("page.html").read_text(encoding="utf-8")
        headers = {
            "Content-Security-Policy": NO_SCRIPTS_OF_OTHERS,
            "Referrer-Policy": "no-referrer",
        }
        return HTMLResponse(page, headers={**headers, "X-Content-Type-Options": "nosniff"})

    async def _health(self, request: Request) -> Response:
        body = {"status": "ok", "requests": self._engine.load, "computed": self._engine.computed}
        return JSONResponse(body)

    async def _models(self, request: Request) -> Response:
        data = [self._described(name) for name in self._settings.models]
        return JSONResponse({"object": "list", "data": data})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(self._described(self._named(request.path_params["name"])))

    def _described(self, name: str) -> dict[str, Any]:
        created = self._settings.created
        return {"id": name, "object": "model", "created": created, "owned_by": "tinyllama"}

    def _named(self, name: str | None) -> str:
        """The model of a request. Raises Refused."""
        models = self._settings.models
        if name is None or name == "":
            return models[0]
        if name not in models:
            message = f"model: got {name!r}, must be one of {', '.join(models)}"
            raise Refused(404, message, "model_not_found")
        return name

    async def _completions(self, request: Request) -> Response:
        wanted = await self._wanted(request, CompletionWanted)
        with _refusing():  # on another thread: megabytes of text take seconds
            ids = await asyncio.to_thread(protocol.prompt_ids, wanted.prompt, self._tokenizer)
        return await self._answer(wanted, ids, DEFAULT_COMPLETION_TOKENS, request, chat=False)

    async def _chat(self, request: Request) -> Response:
        wanted = await self._wanted(request, ChatWanted)
        template = self._settings.template
        if template is None:
            raise Refused(400, "the model has no chat template: start the server with --template")
        with _refusing():
            encode = partial(template.encode_prompt, tools=wanted.tools)
            ids = await asyncio.to_thread(encode, wanted.messages)
        return await self._answer(wanted, ids, None, request, chat=True)

    async def _wanted(self, request: Request, kind: type[AnyWanted]) -> AnyWanted:
        """What a request's body says. Raises Refused."""
        most, parts, size = self._settings.body_bytes, [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > most:
                        raise Refused(413, f"the request must be at most {most} bytes")
        except TimeoutError:
            raise Refused(408, f"the request must be sent within {BODY_SECONDS:g} s") from None
        except ClientDisconnect:
            raise Refused(400, "the client has gone") from None
        with _refusing():
            return protocol.parse_request(b"".join(parts), kind)

    async def _answer(
        self, wanted: Wanted, ids: list[int], default: int | None, request: Request, *, chat: bool
    ) -> Response:
        name = self._named(wanted.model)
        with _refusing():
            count = self._new_tokens(wanted.limit, len(ids), default)
            stop, top = [*self._settings.stop, *wanted.stops], wanted.top
            completions = [
                Completion(
                    self._tokenizer, ids, count, sampling, stop,
                    continued=not chat, logprobs=top is not None,
                )
                for sampling in wanted.samplings(self._settings.sampling)
            ]  # fmt: skip
        choices = _Choices(self._engine, name, completions, self._settings.seconds)
        form = Form(name, self._tokenizer, top, chat=chat)
        if wanted.stream:
            return _Events(_events(choices, form, wanted.includes_usage), choices.cancel)
        try:
            body = await _unless_gone(request.receive, choices.whole(form))
        finally:
            choices.cancel()
        return Response(status_code=499) if body is None else JSONResponse(body)

    def _new_tokens(self, wanted: int | None, prompt: int, default: int | None) -> int:
        """How many tokens may be made. Raises ConfigError."""
        room, limit = self._settings.length - prompt, self._settings.max_new_tokens
        if prompt < 1:
            raise ConfigError("the prompt holds no token")
        if room < 1:
            raise ConfigError(
                f"the prompt has {prompt} tokens, must be fewer than the "
                f"{self._settings.length} of the context"
            )
        return min(count for count in (wanted or default, limit, room) if count is not None)


class _refusing:
    """Turns a mistake of the user into status 400."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ConfigError | DataError | TokenizerError):
            raise Refused(400, str(error)) from None


class _Choices:
    """The completions of one HTTP request, as the engine makes them."""

    def __init__(
        self, of: Engine, model: str, completions: Sequence[Completion], seconds: float
    ) -> None:
        """Raises Refused where the engine does not take them."""
        self._engine, self.completions = of, completions
        self._queue: asyncio.Queue[tuple[int, Made | Exception | None]] = asyncio.Queue()
        loop, deadline = asyncio.get_running_loop(), time.monotonic() + seconds

        def report(index: int) -> Callable[[Made | Exception | None], None]:
            def put(news: Made | Exception | None) -> None:
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self._queue.put_nowait, (index, news))

            return put

        self._requests = [
            engine.Request(model, completion, report(index), deadline)
            for index, completion in enumerate(completions)
        ]
        try:
            of.submit(self._requests)
        except Busy as error:
            raise Refused(429, str(error), "busy", {"Retry-After": "1"}) from None
        except Closed as error:
            raise Refused(503, str(error), "stopping") from None

    def cancel(self) -> None:
        """Make no more of what is not finished."""
        for request in self._requests:
            if request.completion.finish_reason is None:
                self._engine.cancel(request)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Made | None]]:
        """(index, piece) as they come, with None behind the last one of a choice.

        Raises Refused.
        """
        ended = 0
        while ended < len(self._requests):
            index, news = await self._queue.get()
            if isinstance(news, Exception):
                raise _refusal(news)
            ended += news is None
            yield index, news

    async def whole(self, form: Form) -> dict[str, Any]:
        """The answer once it is complete. Raises Refused."""
        pieces: list[list[Made]] = [[] for _ in self._requests]
        async for index, made in self:
            if made is not None:
                pieces[index].append(made)
        reasons = [str(completion.finish_reason) for completion in self.completions]
        return form.whole([*zip(pieces, reasons, strict=True)], self.usage())

    def usage(self) -> dict[str, int]:
        """Tokens of the prompt and of all choices."""
        made = sum(completion.made for completion in self.completions)
        return protocol.usage(self.completions[0].prompt_tokens, made)


async def _events(choices: _Choices, form: Form, with_usage: bool) -> AsyncIterator[Any]:
    """The objects of a stream."""
    try:
        for index in range(len(choices.completions)):
            if (event := form.first(index)) is not None:
                yield event
        async for index, made in choices:
            if made is None:
                yield form.last(index, str(choices.completions[index].finish_reason))
            elif made.text or (made.logprobs is not None and made.token is not None):
                yield form.piece(index, made)
        if with_usage:
            yield form.usage(choices.usage())
    except Refused as error:
        yield protocol.error(str(error), "server_error", error.code)


class _Events(Response):
    """Server-sent events, one per object, and [DONE]. `gone` is called when the stream ends, also
    because the client has gone."""

    def __init__(self, events: AsyncIterator[Any], gone: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._events, self._gone = events, gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(receive, self._send(send))
        finally:
            self._gone()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for event in self._events:
            await self._write(send, msgspec.json.encode(event))
        await self._write(send, b"[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send, data: bytes) -> None:
        line = b"data: " + data + b"\n\n"
        await send({"type": "http.response.body", "body": line, "more_body": True})


async def _unless_gone(receive: Receive, work: Awaitable[Result]) -> Result | None:
    """What `work` gives; None, with the work cancelled, as soon as the client has gone."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


class _Guard:
    """Refuses requests of a wrong Host or Origin."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
            problem = self._problem(headers.get(b"host", ""), headers.get(b"origin"))
            if problem:
                await Refused(403, problem).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _problem(self, host: str, origin: str | None) -> str | None:
        if not is_allowed_host(host, self._settings.hosts):
            return f"Host: got {host!r}; start the server with --allow-host to answer to it"
        if origin is None or origin in self._settings.origins:
            return None
        if urlsplit(origin).netloc.lower() == host.lower():
            return None
        return f"Origin: got {origin!r}; start the server with --cors to answer to its pages"


def is_allowed_host(host: str, names: frozenset[str]) -> bool:
    """Whether a Host header holds an address, localhost or one of `names`, with any port."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name == "localhost" or name.endswith(".localhost") or name in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class _Key:
    """Refuses requests to /v1 without the key, if there is one."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._key and scope["path"].startswith("/v1/"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
                refused = Refused(401, "the API key is missing or wrong", "invalid_api_key")
                await refused.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


async def _unknown(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return Refused(status, f"{request.method} {request.url.path}: no such address").response()
