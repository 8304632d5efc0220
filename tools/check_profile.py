"""Open the files of a profile in the programs that they are for.

    .venv/bin/python tools/check_profile.py

speedscope's own page, from npm, reads both profile.speedscope.json and trace.json in Debian's
Chromium; Perfetto's trace_processor, which its package downloads at its first use, reads
trace.json. Exits with code 1 where one of them refuses a file.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SPEEDSCOPE = "speedscope@1.25.0"


def profile(folder: Path) -> int:
    """Profile a small configuration into `folder`; how many spans its trace has."""
    options = ["model.num_layers=2", "training.batch_size=1", "data.context_length=128"]
    words = [word for option in options for word in ("--set", option)]
    command = [sys.executable, "-m", "tinyllama", "profile", "demo", "--steps", "2", *words]
    subprocess.run(
        [*command, "--out", str(folder)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return sum(event["ph"] == "X" for event in events)


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
        spans = profile(folder)
        if wrong := in_speedscope(folder):
            sys.exit("\n".join(wrong))
        print(f"speedscope opens profile.speedscope.json and trace.json ({spans} spans)")
        print(in_perfetto(folder, spans))


if __name__ == "__main__":
    main()
