"""Talk to SmolLM2 in a terminal, over HTTP and in a browser, and write down what was seen.

python tools/talk.py --out docs/chat.md      (make talk; 2 minutes on a quiet machine)

Every line of the table is a check: one that fails ends the program with what was seen instead.
"""

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/helpers"))

import demo
import docstrings
import smollm2
from chat_helpers import served
from runs_helpers import environment
from terminal_helpers import Terminal

from tinyllama.cli.arguments import exit_code, leave
from tinyllama.errors import ConfigError
from tinyllama.system.files import atomic_write

BEGIN, END = "<!-- begin talk: written by make talk -->", "<!-- end talk -->"
FIRST, SECOND = "The secret word is banana.", "Repeat the secret word."
LONG = "Write a long story about a ship."
PROMPTS = ["Name a colour.", "What is 2 + 2?", "Name an animal.", "What is the capital of France?",
           "Name a fruit.", "Say hello.", "Name a planet.", "What is water?"]  # fmt: skip
KEY = "a-secret"


class Table:
    """What was seen, a line per check."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, what: str, seen: str) -> None:
        """A check that holds."""
        self.lines.append(f"| {what} | {seen} |")
        print(self.lines[-1], flush=True)


def check(holds: bool, what: str, seen: object) -> None:
    """Raises ConfigError where a check fails."""
    if not holds:
        raise ConfigError(f"{what}: {seen}")


def quoted(text: str, most: int = 60) -> str:
    """A text within a cell of a table."""
    line = " ".join(text.split()).replace("|", "\\|")
    return f'"{line[:most]}{"..." if len(line) > most else ""}"'


# ---- in a terminal


def in_a_terminal(model: Path, folder: Path, table: Table) -> None:
    """Two turns, /reset, /save, and Ctrl-C within an answer."""
    begun = time.monotonic()
    with Terminal("chat", model, "--temperature", "0", "--max-new-tokens", "300") as at:
        at.wait_for_prompt(1, 300)
        table.add("chat: from the command to its prompt", f"{time.monotonic() - begun:.1f} s")
        answers = [said(at, text, n) for n, text in enumerate((FIRST, SECOND), 2)]
        check("banana" in answers[1], "the second turn knows the first", answers)
        table.add("chat: two turns", f"{quoted(answers[0])}, {quoted(answers[1])}")
        saved = folder / "said.jsonl"
        at.type(f"/save {saved}\r")
        at.wait_for_prompt(4, 60)
        (line,) = saved.read_text().splitlines()
        messages = json.loads(line)["messages"]
        found = [message["content"].strip() for message in messages if message["role"] != "system"]
        check(found == [FIRST, answers[0], SECOND, answers[1]], "/save", messages)
        at.type("/reset\r")
        at.wait_for_prompt(5, 60)
        alone = said(at, SECOND, 6)
        check("banana" not in alone, "/reset forgets the conversation", alone)
        table.add("chat: `/save`, `/reset`, the question again", quoted(alone))
        before = len(at.shown)
        at.type(f"{LONG}\r")
        at.wait(lambda: len(at.shown) > before + len(LONG) + 60, 120)
        at.type("\x03")
        begun = time.monotonic()
        at.wait_for_prompt(7, 60)
        seconds = time.monotonic() - begun
        story = at.shown[before:].partition(LONG)[2]
        check(0 < len(story) < 1500 and seconds < 10, "Ctrl-C stops an answer", (seconds, story))
        table.add("chat: Ctrl-C in a long answer", f"next prompt after {seconds:.2f} s")
        at.type("/exit\r")
        check(at.end() == 0, "/exit", at.shown)


def said(at: Any, text: str, prompts: int) -> str:
    """The answer to a line: all that is shown before the next prompt."""
    before = len(at.shown)
    at.type(f"{text}\r")
    at.wait_for_prompt(prompts, 120)
    # The terminal shows what is typed, and behind the answer the next prompt.
    answer: str = at.shown[before:].rpartition(f"> {text}\n")[2].rstrip("> \b\n")
    return answer.strip()


# ---- over HTTP


def sent(address: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
    """Status, parsed body and headers."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.loads(answer.read() or b"null"), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read()), error.headers


def by_client(address: str, table: Table) -> None:
    """OpenAI's own client."""
    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)
    names = [model.id for model in client.models.list()]
    table.add("serve: `models.list()`", ", ".join(names))

    def ask(content: str, **options: Any) -> Any:
        given = {"model": names[0], "max_tokens": 24, "temperature": 0} | options
        return client.chat.completions.create(
            messages=[{"role": "user", "content": content}], **given
        )

    whole = ask(PROMPTS[3])
    text = whole.choices[0].message.content
    check("Paris" in text, "an answer", text)
    usage = whole.usage
    table.add("serve: an answer", f"{quoted(text)}, {usage.prompt_tokens} + "
              f"{usage.completion_tokens} tokens")  # fmt: skip
    events = list(ask(PROMPTS[3], stream=True, stream_options={"include_usage": True}))
    pieces = [e.choices[0].delta.content or "" for e in events if e.choices]
    check("".join(pieces) == text and events[-1].usage == usage, "a stream", pieces)
    table.add("serve: the same as a stream", f"{len(pieces)} events, the same text and usage")
    stopped = ask(PROMPTS[3], stop=["Paris"]).choices[0]
    check(stopped.message.content == text[: text.index("Paris")], "stop", stopped)
    hot = [ask("Name a colour.", temperature=1.5, seed=seed, max_tokens=12) for seed in (1, 1, 2)]
    drawn = [answer.choices[0].message.content for answer in hot]
    check(drawn[0] == drawn[1] != drawn[2], "seed", drawn)
    table.add("serve: `stop=['Paris']`; seeds 1, 1, 2", f"{quoted(stopped.message.content)}; "
              f"{', '.join(quoted(one, 16) for one in drawn)}")  # fmt: skip
    base, other = (ask(LONG, model=name).choices[0].message.content for name in names)
    check(other != base, "an adapter changes the answer", other)
    table.add(f"serve: the adapter `{names[1]}`", quoted(other))
    _remembers(address, table)
    _together(ask, table)
    _leaves(address, table)


def _remembers(address: str, table: Table) -> None:
    """Of a conversation that goes on only the new tokens are computed."""

    def computed() -> int:
        return int(sent(address, "/health")[1]["computed"])

    turns = [{"role": "user", "content": "The ship sails across the sea. " * 12}]
    body = {"messages": turns, "max_tokens": 8, "temperature": 0}
    _, first, _ = sent(address, "/v1/chat/completions", body)
    before = computed()
    answer = first["choices"][0]["message"]["content"]
    more = [*turns, {"role": "assistant", "content": answer}, {"role": "user", "content": "Go on."}]
    _, second, _ = sent(address, "/v1/chat/completions", body | {"messages": more})
    tokens, new = second["usage"]["prompt_tokens"], computed() - before
    check(new < 40 < 100 < tokens, "the prefix is kept", (tokens, new))
    table.add("serve: second turn of a conversation", f"{tokens} tokens, {new} computed with the "
              "answer's 8")  # fmt: skip


def _together(ask: Callable[..., Any], table: Table) -> None:
    """Eight clients at once have the answers of one after another."""

    def timed(mapped: Callable[..., Any]) -> tuple[list[str], float]:
        begun = time.monotonic()
        answers = [answer.choices[0].message.content for answer in mapped(ask, PROMPTS)]
        return answers, time.monotonic() - begun

    alone, one = timed(map)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together, eight = timed(pool.map)
    check(alone == together, "eight clients at once", (alone, together))
    table.add("serve: 8 questions of 8 clients, one by one and at once",
              f"{one:.1f} s and {eight:.1f} s, the same answers")  # fmt: skip


def _leaves(address: str, table: Table) -> None:
    """A client that leaves ends its computation."""
    host, port = address.removeprefix("http://").split(":")
    messages = [{"role": "user", "content": LONG}]
    body = json.dumps({"messages": messages, "max_tokens": 2000, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        received = b""
        while received.count(b"delta") < 3:
            received += connection.recv(1000)
    begun = time.monotonic()
    while sent(address, "/health")[1]["requests"]:
        check(time.monotonic() - begun < 20, "a client that leaves", "still computed")
        time.sleep(0.01)
    table.add("serve: a client leaves", f"nothing computed after {time.monotonic() - begun:.2f} s")


def guarded(model: Path, folder: Path, table: Table) -> None:
    """Key, Host, Origin, CORS, the limits of time, size and queue."""
    key = folder / "key"
    key.write_text(KEY)
    words = ["--api-key-file", key, "--cors", "https://page.example", "--timeout", 3]
    with served(*words, "--queue", 1, "--parallel", 1, model=model) as (address, _):
        keyed = {"Authorization": f"Bearer {KEY}"}
        body = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 2000}
        statuses = {
            "no key": sent(address, "/v1/models")[0],
            "the key": sent(address, "/v1/models", **keyed)[0],
            "Host: evil.example": sent(address, "/v1/models", **keyed, Host="evil.example")[0],
            "Origin: http://evil.example": sent(
                address, "/v1/models", **keyed, Origin="http://evil.example"
            )[0],
            "5 MB": sent(address, "/v1/chat/completions", b" " * (5 << 20), **keyed)[0],
            "3 s are over": sent(address, "/v1/chat/completions", body, **keyed)[0],
        }
        expected = [401, 200, 403, 403, 413, 504]
        check([*statuses.values()] == expected, "statuses", statuses)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            full = pool.map(lambda _: sent(address, "/v1/chat/completions", body, **keyed)[0],
                            range(4))  # fmt: skip
            statuses["4 at once, of which 1 waits"] = max(s for s in full if s != 504)
        check(statuses["4 at once, of which 1 waits"] == 429, "the queue", statuses)
        cors = sent(address, "/v1/models", **keyed, Origin="https://page.example")[2]
        check(cors["access-control-allow-origin"] == "https://page.example", "cors", dict(cors))
    table.add("serve: statuses", ", ".join(f"{what} {status}" for what, status in statuses.items()))


# ---- in a browser


def in_a_browser(address: str, table: Table) -> None:
    """The page in Chromium: an answer, a second turn, Stop, New chat."""
    from playwright.sync_api import expect, sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    check(chromium is not None, "no chromium", "type tools/system.sh chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)

        def ask(text: str) -> None:
            page.get_by_label("Message").fill(text)
            page.keyboard.press("Enter")

        for number, text in enumerate((FIRST, SECOND)):
            ask(text)
            expect(page.locator(".assistant").nth(number)).not_to_be_empty(timeout=120_000)
            expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=120_000)
        shown = page.locator(".assistant").nth(1).inner_text()
        check("banana" in shown, "the page's second turn", shown)
        ask(LONG)
        expect(page.locator(".assistant").nth(2)).not_to_be_empty(timeout=120_000)
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=30_000)
        left = len(page.locator(".assistant").nth(2).inner_text())
        page.get_by_role("button", name="New chat").click()
        expect(page.locator(".message")).to_have_count(0)
        version = browser.version
        browser.close()
        check(not problems, "the console", problems)
    table.add(f"page in Chromium {version.partition('.')[0]}: the second turn", quoted(shown))
    table.add("page: Stop, New chat", f"{left} characters were shown; the page is empty")


# ---- from files


def from_files(model: Path, folder: Path, table: Table) -> None:
    """generate and evaluate."""

    def run(*words: object, given: str = "") -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tinyllama", *map(str, words)],
            input=given, capture_output=True, text=True, env=environment(),
        )  # fmt: skip
        check(done.returncode == 0, " ".join(map(str, words)), done.stderr[-500:])
        return done.stdout

    greedy = ["--model", model, "--temperature", 0, "--max-new-tokens", 16]
    text = run("generate", *greedy, "--prompt", "-", given="The capital of France is")
    check("Paris" in text, "generate from standard input", text)
    table.add("`generate --prompt -`", quoted(text))
    text = run("generate", *greedy, "--chat", "--prompt", PROMPTS[3])
    check("Paris" in text, "generate --chat", text)
    table.add("`generate --chat`", quoted(text))
    rows = [{"prompt": "The capital of France is"},
            {"messages": [{"role": "user", "content": PROMPTS[3]}]}]  # fmt: skip
    prompts, answers = folder / "prompts.jsonl", folder / "answers.jsonl"
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run("generate", *greedy, "--prompts", prompts, "--out", answers)
    made = [json.loads(line) for line in answers.read_text().splitlines()]
    check(len(made) == 2 and all("Paris" in row["text"] for row in made), "--prompts", made)
    table.add("`generate --prompts`, a prompt and messages", quoted(made[1]["text"]))
    talks = folder / "talks.jsonl"
    right, wrong = "The capital of France is Paris.", "Green ideas sleep seven under."
    losses = []
    for answer in (right, wrong):
        messages = [{"role": "user", "content": PROMPTS[3]},
                    {"role": "assistant", "content": answer}]  # fmt: skip
        talks.write_text(json.dumps({"messages": messages}) + "\n")
        losses.append(json.loads(run("evaluate", "--model", model, "--data", talks)))
    check(losses[0]["loss"] < losses[1]["loss"], "evaluate", losses)
    table.add("`evaluate`, a right answer and nonsense: nats per token of the answer",
              f"{losses[0]['loss']:.2f}, {losses[1]['loss']:.2f}")  # fmt: skip


@contextmanager
def adapter_of(model: Path, folder: Path) -> Iterator[Path]:
    """An adapter of a few steps."""
    docstrings.write_rows(Path(sysconfig.get_path("stdlib")), folder)
    settings = smollm2.SETTINGS | {
        "model.base": model,
        "data.train_path": folder / "train.jsonl",
        "data.cache_dir": folder / "cache",
        "data.context_length": 64,
        "checkpointing.checkpoint_dir": folder / "run",
        "training.max_steps": 6,
        "training.learning_rate": 3e-3,
        "lr_schedule.warmup_steps": 0,
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "tinyllama", "train", "lora", "--quiet", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    check(done.returncode == 0, " ".join(command), done.stderr[-500:])
    yield folder / "run" / "final"


def talk(model: Path, out: Path) -> None:
    """All checks; the table goes between the marks of `out`."""
    table = Table()
    with TemporaryDirectory() as name:
        folder = Path(name)
        in_a_terminal(model, folder, table)
        from_files(model, folder, table)
        with adapter_of(model, folder) as adapter:
            begun = time.monotonic()
            words = ["--adapter", f"docstrings={adapter}", "--temperature", 0]
            with served(*words, "--max-new-tokens", 400, model=model) as (address, _):
                seconds = time.monotonic() - begun
                table.add("serve: from the command to its address", f"{seconds:.1f} s")
                by_client(address, table)
                in_a_browser(address, table)
        guarded(model, folder, table)
    load = os.getloadavg()[0]
    text = f"""{BEGIN}
Written on {time.strftime("%Y-%m-%d")} on {os.cpu_count()} cores at a load of {load:.0f}, with
{model.name}, greedy where nothing else is said:

| what | seen |
|---|---|
{chr(10).join(table.lines)}
{END}"""
    document = out.read_text()
    check(BEGIN in document and END in document, str(out), f"holds no {BEGIN} and {END}")
    written = re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: text, document, flags=re.S)
    atomic_write(out, written.encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 where a check fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gguf", type=Path, help="SmolLM2's file (default: it is downloaded)")
    parser.add_argument("--out", type=Path, required=True, help="the document with the table")
    options = parser.parse_args(arguments)
    model = options.gguf
    if model is None:
        os.chdir(demo.ROOT)
        smollm2.fetch(smollm2.BASE)
        model = smollm2.BASE
    talk(model.resolve(), options.out)
    return 0


if __name__ == "__main__":
    leave(exit_code(main, "talk"))
