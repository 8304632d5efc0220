"""Send a run's traces to Arize Phoenix, read them back through its API, take a picture of them.

    .venv-phoenix/bin/python tools/phoenix.py --tinyllama .venv/bin/tinyllama --picture FILE.png

Phoenix (a collector with a database and pages) is in an environment of its own. Exits with code 1
and a line per difference where what it has is not what the run did.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 6, 3
START_SECONDS = 120


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def phoenix(folder: Path) -> Iterator[str]:
    """A Phoenix server that keeps its data in `folder`: its address."""
    port = free_port()
    variables = {"PHOENIX_PORT": port, "PHOENIX_GRPC_PORT": free_port()}
    variables |= {"PHOENIX_WORKING_DIR": folder, "PHOENIX_TELEMETRY_ENABLED": "false"}
    env = os.environ | {name: str(value) for name, value in variables.items()}
    log = (folder / "log").open("w")
    command = [str(Path(sys.executable).with_name("phoenix")), "serve"]
    server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, server)
        yield address
    finally:
        server.terminate()
        server.wait()


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    """Return when the server answers; SystemExit if it does not."""
    for _ in range(START_SECONDS):
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"{address}/healthz", timeout=2)
            return
        if server.poll() is not None:
            break
        time.sleep(1)
    sys.exit("Phoenix did not start")


def train(tinyllama: str, endpoint: str, folder: Path) -> float:
    """A small run on this project's own text; returns its seconds."""
    text = folder / "text.txt"
    text.write_text((ROOT / "NOTES.md").read_text() + (ROOT / "README.md").read_text())
    options = {
        "model.vocab_size": 512, "model.hidden_size": 128, "model.num_layers": 2,
        "model.num_heads": 4, "model.intermediate_size": 256, "model.max_seq_len": 128,
        "data.context_length": 128, "data.train_path": f'"{text}"', "data.val_path": f'"{text}"',
        "data.cache_dir": f'"{folder}/cache"', "training.batch_size": 4,
        "training.max_steps": STEPS, "training.eval_every": 3, "checkpointing.save_every": 4,
        "checkpointing.checkpoint_dir": f'"{folder}/run"', "observe.otlp_operations_every": EVERY,
        "lr_schedule.warmup_steps": 1,
    }  # fmt: skip
    words = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    env = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "DEV": "CPU"}
    begun = time.monotonic()
    subprocess.run([tinyllama, "train", "124m", "--quiet", *words], env=env, check=True)
    return time.monotonic() - begun


def spans_of(address: str) -> list[dict[str, Any]]:
    """All spans of the project that runs belong to, page by page."""
    found, cursor = [], ""
    while True:
        page = f"{address}/v1/projects/default/spans?limit=500{cursor}"
        with urllib.request.urlopen(page) as answer:
            content = json.load(answer)
        found += content["data"]
        if not content.get("next_cursor"):
            return found
        cursor = f"&cursor={content['next_cursor']}"


def read_back(address: str) -> list[dict[str, Any]]:
    """The spans, once Phoenix has stored the last of them, the run's own."""
    for _ in range(30):
        spans = spans_of(address)
        if any(span["name"] == "run" for span in spans):
            return spans
        time.sleep(1)
    sys.exit("Phoenix has no span of the run")


def differences(spans: list[dict[str, Any]]) -> list[str]:
    """What is not as the run was."""
    names = Counter(span["name"] for span in spans)
    expected = {"run": 1, "epoch": 1, "step": STEPS, "data": STEPS, "update": STEPS}
    expected |= {"forward and backward": STEPS, "validate": STEPS // 3, "save": 2}
    wrong = [
        f"{name}: {names[name]} spans, expected {count}"
        for name, count in expected.items()
        if names[name] != count
    ]
    parents = {span["context"]["span_id"]: span["name"] for span in spans}
    inside = {"epoch": "run", "step": "epoch", "data": "step", "update": "step", "validate": "step"}
    for span in spans:
        parent = parents.get(span["parent_id"])
        if span["name"] in inside and parent != inside[span["name"]]:
            wrong.append(f"{span['name']} is within {parent}")
    kernels = [span for span in spans if "code.source" in span["attributes"]]
    if not any("llama.py" in span["attributes"]["code.source"] for span in kernels):
        wrong.append("no kernel names a line of the model")
    return wrong


def take_picture(address: str, picture: Path) -> None:
    """The page of the run's trace, in Debian's Chromium."""
    from playwright.sync_api import sync_playwright

    spans = spans_of(address)
    trace = next(span for span in spans if span["name"] == "run")["context"]["trace_id"]
    with urllib.request.urlopen(f"{address}/v1/projects/default") as answer:
        project = json.load(answer)["data"]["id"]
    with sync_playwright() as library:
        browser = library.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(f"{address}/projects/{project}/traces/{trace}")
        page.get_by_text("forward and backward").first.wait_for(timeout=60_000)
        page.wait_for_timeout(2000)
        page.screenshot(path=picture)
        browser.close()


def main() -> None:
    """Train, read back, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tinyllama", required=True, help="the command that trains")
    parser.add_argument("--picture", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with phoenix(folder) as address:
            seconds = train(options.tinyllama, address, folder)
            spans = read_back(address)
            wrong = differences(spans)
            print(f"{len(spans)} spans of {STEPS} steps read back, {seconds:.1f} s of training")
            take_picture(address, options.picture)
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"as the run was; {options.picture} shows it")


if __name__ == "__main__":
    main()
