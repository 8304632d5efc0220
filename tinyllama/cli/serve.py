"""Serve a model over HTTP as OpenAI's interface, with a page to chat with.

tinyllama serve checkpoints/chat/final --port 8000
"""

import argparse
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama.cli.arguments import count, path, seconds
from tinyllama.cli.sampling import add_sampling, sampling_of
from tinyllama.cli.shared import add_threads, load, model_folder, select_device
from tinyllama.cli.talking import (
    add_model_word,
    context_length,
    named_adapters,
    template_of,
)
from tinyllama.errors import ConfigError, missing, reason
from tinyllama.system.notices import to_stderr
from tinyllama.system.signals import stopping_on_signals

if TYPE_CHECKING:
    from tinyllama.model.llama import Llama

_MOST_KEY_BYTES = 1 << 12
GRACE_SECONDS = 5  # in which answers may end after a signal


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command line."""
    add_model_word(parser)
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="an adapter of MODEL that requests choose as their model; may be given several times",
    )
    parser.add_argument("--name", help="what MODEL is called (default: its folder's name)")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument(
        "--api-key-file",
        type=path,
        metavar="FILE",
        help="answer only to requests with the key that this file holds",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name of this machine to answer to, besides addresses and localhost",
    )
    parser.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin use the server, such as https://example.org",
    )
    parser.add_argument(
        "--parallel", type=count, default=4, help="answers computed together (default: 4)"
    )
    parser.add_argument("--queue", type=count, default=32, help="most that wait (default: 32)")
    parser.add_argument(
        "--timeout", type=seconds, default=600.0, help="most seconds per request (default: 600)"
    )
    add_sampling(parser, None)
    add_threads(parser)


def run(options: argparse.Namespace) -> int:
    """Serve until a signal; the exit code is 130 or 143."""
    sampling, adapters, key = sampling_of(options), named_adapters(options.adapter), _key(options)
    try:
        import uvicorn

        from tinyllama.generate.server import Server, Settings
    except ImportError as error:
        raise ConfigError(
            f"{missing(error)} is not installed: pip install 'tinyllama-trainer[serve]'"
        ) from None
    import asyncio

    from tinyllama.generate.batch import Batch
    from tinyllama.generate.engine import Engine

    listening = _listen(options.host, options.port)
    with listening:
        choice = select_device(options.threads)
        name = options.name or _name(model_folder(options.model))
        if name in adapters:
            raise ConfigError(f"--adapter: {name!r} is what the model itself is called")
        tokenizer, model = load(options.model, options.base)
        to_stderr(choice.line())
        length = context_length(options.context, model.config.max_seq_len)
        models = {name: model} | _adapted(model, options.model, adapters)
        batches = {n: partial(Batch, m, length, options.parallel) for n, m in models.items()}
        template = None
        if options.template or tokenizer.chat_template is not None:
            template = template_of(tokenizer, options.template)
        else:
            to_stderr("the model has no chat template: only /v1/completions works; see --template")
        settings = Settings(
            [*models],
            length,
            sampling,
            options.stop,
            options.max_new_tokens,
            template,
            key,
            frozenset(options.allow_host),
            tuple(options.cors),
            seconds=options.timeout,
        )
        engine = Engine(batches, options.queue)
        config = uvicorn.Config(
            Server(engine, tokenizer, settings).app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
            limit_concurrency=options.queue + options.parallel + 32,
        )
        address = _address(listening)
        try:
            engine.compile(name)  # so that the first answers come as quickly as the others
            with stopping_on_signals("stopping: answers in progress may end\n") as stopped:
                listening.listen()
                print(f"serving {', '.join(models)} at {address}", flush=True)
                return asyncio.run(_serve(uvicorn.Server(config), listening, stopped))
        finally:
            engine.close()


async def _serve(server: Any, listening: socket.socket, stopped: Any) -> int:
    """Serve until stopped() gives an exit code, and return it."""
    import asyncio

    async def watch() -> None:
        while not stopped():
            await asyncio.sleep(0.1)
        server.should_exit = True

    watching = asyncio.create_task(watch())
    # Not `serve`, which would take over the signals.
    await server._serve([listening])
    watching.cancel()
    return int(stopped())


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before seconds go into loading a model. Raises ConfigError."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port: got {port}, must be 0 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
    except OSError as error:
        raise ConfigError(f"--host: got {host}: {error.strerror}") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise ConfigError(f"--port: {host}:{port} cannot be used: {reason(error)}") from None
    return listening


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _key(options: argparse.Namespace) -> str | None:
    """The API key. Raises ConfigError for a file that holds none, and OSError."""
    file: Path | None = options.api_key_file
    if file is None:
        return None
    from tinyllama.system.untrusted import read_small

    key = read_small(file, ConfigError, _MOST_KEY_BYTES).decode(errors="replace").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(f"{file}: must hold a key of one line of ASCII characters")
    return key


def _name(folder: Path) -> str:
    """What a model is called: its folder's name, or that of the run whose final/ or step it is."""
    folder = folder.absolute()
    inner = folder.name == "final" or folder.name.startswith("step-")
    return (folder.parent.name if inner else folder.stem) or "model"


def _adapted(model: "Llama", base: Path, adapters: dict[str, Path]) -> "dict[str, Llama]":
    """The model with each adapter; the weights of the base are in memory once."""
    from tinyllama.cli.shared import verify_model
    from tinyllama.model.build import with_adapter

    found = {}
    base = model_folder(base)
    for name, folder in adapters.items():
        folder = model_folder(folder)
        verify_model(folder, base)
        found[name] = with_adapter(model, folder, base)
    return found
