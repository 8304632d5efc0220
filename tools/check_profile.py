"""Open the files of a profile in the programs that they are for.

    .venv/bin/python tools/check_profile.py

speedscope's own page, from npm, reads both profile.speedscope.json and trace.json in Debian's
Chromium; the parser of traces in Chrome's developer tools, from npm too, reads trace.json; so does
Perfetto's trace_processor, which its package downloads at its first use, where that is possible.
Exits with code 1 where one of them refuses a file, or finds other spans in it.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SPEEDSCOPE = "speedscope@1.25.0"
DEVTOOLS = "@paulirish/trace_engine@0.0.65"  # as its authors publish it for other programs
COUNT = """
import fs from 'node:fs';
import * as Trace from '@paulirish/trace_engine/models/trace/trace.js';
globalThis.DOMRect ??= class {};
const model = Trace.TraceModel.Model.createWithAllHandlers();
await model.parse(JSON.parse(fs.readFileSync('trace.json', 'utf8')).traceEvents);
const threads = [...model.parsedTrace().data.Renderer.processes.values()]
  .flatMap(process => [...process.threads.values()]);
console.log(JSON.stringify(Object.fromEntries(threads.map(t => [t.name, t.entries.length]))));
"""


def profile(folder: Path) -> dict[str, int]:
    """Profile a small configuration into `folder`; how many spans each track of its trace has."""
    options = ["model.num_layers=2", "training.batch_size=1", "data.context_length=128"]
    words = [word for option in options for word in ("--set", option)]
    command = [sys.executable, "-m", "tinyllama", "profile", "demo", "--steps", "2", *words]
    subprocess.run(
        [*command, "--out", str(folder)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    return dict(Counter(tracks[event["tid"]] for event in events if event["ph"] == "X"))


def in_speedscope(folder: Path) -> list[str]:
    """What is wrong with the files for speedscope's page."""
    from playwright.sync_api import sync_playwright

    subprocess.run(["npm", "pack", "--silent", SPEEDSCOPE], check=True, cwd=folder,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    (archive,) = folder.glob("speedscope-*.tgz")
    shutil.unpack_archive(archive, folder / "speedscope")
    address = (folder / "speedscope/package/dist/release/index.html").as_uri()
    wrong: list[str] = []
    with sync_playwright() as library:
        browser = library.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name, title in (
            ("profile.speedscope.json", "a training step"),
            ("trace.json", "trace.json"),
        ):
            page = browser.new_page()
            page.on("pageerror", lambda error, name=name: wrong.append(f"{name}: {error}"))
            page.goto(address)
            page.set_input_files("input[type=file]", folder / name)
            try:
                page.wait_for_function(f"document.title.includes({title!r})", timeout=20_000)
            except Exception as error:
                wrong.append(f"{name}: {error}")
        browser.close()
    return wrong


def in_devtools(folder: Path) -> dict[str, int]:
    """How many spans Chrome's developer tools find on each track."""
    subprocess.run(["npm", "install", "--silent", DEVTOOLS], check=True, cwd=folder,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    (folder / "count.mjs").write_text(COUNT)
    done = subprocess.run(["node", "count.mjs"], check=True, cwd=folder, stdout=subprocess.PIPE)
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def in_perfetto(folder: Path, spans: int) -> str:
    """What Perfetto's trace_processor says of the trace, or why it does not run here."""
    try:
        from perfetto.trace_processor import TraceProcessor

        with TraceProcessor(trace=str(folder / "trace.json")) as processor:
            (row,) = processor.query("select count(*) as spans from slice")
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        return f"trace_processor does not run here: {str(error)[:120]}"
    if row.spans != spans:
        sys.exit(f"trace_processor: {row.spans} spans of {spans}")
    return f"trace_processor: {spans} spans"


def main() -> None:
    """Profile, open, say what came of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tracks = profile(folder)
        spans = sum(tracks.values())
        if wrong := in_speedscope(folder):
            sys.exit("\n".join(wrong))
        print(f"speedscope opens profile.speedscope.json and trace.json ({spans} spans)")
        if (found := in_devtools(folder)) != tracks:
            sys.exit(f"Chrome's developer tools: {found}, expected {tracks}")
        print(f"Chrome's developer tools read trace.json: {found}")
        print(in_perfetto(folder, spans))


if __name__ == "__main__":
    main()
