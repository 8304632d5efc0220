"""The report: what its page holds, and that a real Chromium draws it."""

import base64
import html
import json
import math
import re
import shutil
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs_helpers import cli, finished_run, metrics

from tinyllama.errors import CheckpointError
from tinyllama.reports.live import Followed, Live
from tinyllama.reports.page import UPLOT_VERSION, page
from tinyllama.reports.runs import named_apart, read_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def write_run(folder: Path, steps: int, lr: float = 1e-3, *, hostile: str = "") -> Path:
    """A run's folder with metrics of so many steps, an anomaly at step 30 and a sample."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(steps)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            line: dict[str, Any] = {
                "step": step, "loss": 3 + 5 * math.exp(-step / 50) + float(rng.normal(0, 0.1)),
                "lr": lr, "grad_norm": 1 + float(rng.random()), "epoch": 1,
                "tokens_per_second": 1000 + float(rng.random()), "memory_bytes": 3 << 28,
            }  # fmt: skip
            if step % 20 == 0:
                line["val_loss"] = line["loss"] + 0.2
            if step == 30:
                note = {"kind": "spike", "series": "loss", "value": 9.0, "usual": 3.0}
                documents = [f"text.jsonl row 7{hostile}"]
                line["anomalies"] = [{**note, "action": "note", "documents": documents}]
            file.write(json.dumps(line) + "\n")
    (folder / "config.toml").write_text(
        f"[model]\nmax_seq_len = 64\n\n[training]\nbatch_size = 4\nlearning_rate = {lr}\n"
    )
    sample = {"step": 40, "prompt": "def ", "text": f"def main():{hostile}"}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return folder


def charts(text: str) -> dict[str, int]:
    """data-chart -> data-points of a page."""
    found = re.findall(r'data-chart="(\w+)" data-points="(\d+)"', text)
    return {name: int(points) for name, points in found}


def embedded(text: str) -> Any:
    (content,) = re.findall(r'id="data">(.*?)</script>', text, re.S)
    return json.loads(content)


def test_a_page_has_each_chart_with_its_points_and_needs_no_network(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", 60))
    text = page([run])
    assert charts(text) == {
        "loss": 60, "val_loss": 3, "lr": 60, "grad_norm": 60, "tokens_per_second": 60,
        "memory_bytes": 60,
    }  # fmt: skip
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "{{" not in text.partition('id="data"')[0]
    losses = np.frombuffer(base64.b64decode(embedded(text)["runs"][0]["columns"]["loss"]), "<f4")
    assert np.array_equal(losses, run.columns["loss"].astype(np.float32))


def test_steps_are_compared_by_tokens_and_by_time(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", 5))
    assert run.columns["tokens"].tolist() == [256.0 * step for step in range(1, 6)]
    seconds = 256 / run.columns["tokens_per_second"]
    assert run.columns["seconds"] == pytest.approx(np.cumsum(seconds))


def test_what_comes_from_a_run_is_text_and_never_markup(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    run = read_run(write_run(tmp_path / "run", 40, hostile=hostile))
    text = page([run])
    assert text.count("<script") == 3 and "<img src=x" not in text
    assert html.escape(hostile) in text
    tags: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            tags.append(tag)

    Tags().feed(text)
    assert "img" not in tags


def test_runs_are_compared_and_what_differs_is_shown(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / name / "run", 40, lr) for name, lr in (("a", 1e-3), ("b", 2e-3))
    ]
    runs = named_apart([read_run(folder) for folder in folders])
    assert [run.name for run in runs] == ["a/run", "b/run"]
    text = page(runs)
    assert charts(text)["loss"] == 80
    assert "<tr class=differs><td><code>training.learning_rate</code></td>" in text
    assert "2 options are the same" in text


def test_the_command_writes_a_page_of_a_real_run(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert cli("report", finished_run(), "--out", out) == 0
    text, lines = out.read_text(), metrics(finished_run())
    assert charts(text)["loss"] == len(lines)
    assert charts(text)["val_loss"] == 2
    assert ("model.hidden_size" in text and "AVX" in text) or "processor" in text
    saved = [one["name"] for one in embedded(text)["runs"][0]["checkpoints"]]
    assert saved[-1] == "final" and saved[0] == "step-00000001"


def test_a_folder_that_is_no_run_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: no such file"):
        read_run(tmp_path)
    assert cli("report", tmp_path / "none", "--out", tmp_path / "x.html") == 2
    assert cli("report", finished_run(), "--out", tmp_path) == 2


def test_the_vendored_library_is_that_of_its_package() -> None:
    folder = Path(__file__).resolve().parents[2] / "tinyllama" / "reports" / "uplot"
    assert f"(v{UPLOT_VERSION})" in (folder / "uPlot.iife.min.js").read_text()[:80]
    assert (folder / "LICENSE").read_text().startswith("The MIT License (MIT)")


@contextmanager
def following(*folders: Path) -> Iterator[Live]:
    """A page that follows runs, while it is served."""
    followed = Followed(folders)
    live = Live(0, followed.page, followed.data)
    try:
        yield live
    finally:
        live.close()


def append(folder: Path, *lines: dict[str, Any]) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_a_page_that_follows_a_run_serves_new_steps_to_this_machine_alone(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 40)
    with following(folder) as live:
        assert live.url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(live.url) as answer:
            assert '"live":true' in answer.read().decode()
        append(folder, {"step": 41, "loss": 3.0})
        with urllib.request.urlopen(f"{live.url}data.json") as answer:
            assert losses_of(json.load(answer)) == 41
        foreign = urllib.request.Request(live.url, headers={"Host": "evil.example:80"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(foreign)
        with urllib.request.urlopen(
            urllib.request.Request(live.url, headers={"Host": "127.0.0.1"})  # as of port 80
        ) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{live.url}../etc/passwd")


def losses_of(content: dict[str, Any]) -> int:
    """How many steps the data of a page have a loss for."""
    column = np.frombuffer(base64.b64decode(content["runs"][0]["columns"]["loss"]), "<f4")
    return int(np.isfinite(column).sum())


def test_what_has_not_changed_is_not_sent_again(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 40)
    followed = Followed([folder])
    first = json.loads(followed.data(""))
    assert losses_of(first) == 40
    assert json.loads(followed.data(first["revision"])) == {"revision": first["revision"]}
    append(folder, {"step": 41, "loss": 3.0})
    second = json.loads(followed.data(first["revision"]))
    assert losses_of(second) == 41
    with open(folder / "samples.jsonl", "a") as file:  # no number changes, the page does
        file.write(json.dumps({"step": 41, "prompt": "?", "text": "a new sample"}) + "\n")
    third = json.loads(followed.data(second["revision"]))
    assert third["revision"] != second["revision"] and "a new sample" in third["sections"]


def test_a_run_that_has_begun_can_be_watched_before_its_first_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: no such file"):
        Followed([run])
    (run / "config.toml").write_text("[model]\nmax_seq_len = 64\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: no such file"):
        read_run(run)  # a page that stays as it is would be empty
    followed = Followed([run])
    assert charts(followed.page())["loss"] == 0
    append(run, {"step": 1, "loss": 3.0})
    assert losses_of(json.loads(followed.data(""))) == 1


def test_a_run_that_is_gone_is_said_on_the_page_that_follows_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 40)
    followed = Followed([folder])
    folder.rename(tmp_path / "elsewhere")
    assert "no such folder" in json.loads(followed.data(""))["problem"]
    (tmp_path / "elsewhere").rename(folder)
    assert losses_of(json.loads(followed.data(""))) == 40


def test_a_browser_that_goes_away_costs_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", 40)
    asked, gone = threading.Event(), threading.Event()
    followed = Followed([folder])

    def slow() -> str:
        asked.set()
        gone.wait(10)
        return followed.page() + " " * (8 << 20)  # more than the sockets hold

    live = Live(0, slow, followed.data)
    try:
        port = int(live.url.rstrip("/").rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert asked.wait(10)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.set()
        time.sleep(0.5)
    finally:
        live.close()
    assert capsys.readouterr().err == ""


def test_time_and_tokens_are_those_of_the_tokens_that_were_trained(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text("[model]\nmax_seq_len = 64\n[training]\nbatch_size = 4\n")
    common = {"loss": 3.0, "tokens_per_second": 100.0}
    append(
        run,
        {"step": 0, "val_loss": 4.0},
        {"step": 1, **common, "trained_tokens": 50},
        {"step": 2, **common, "trained_tokens": 150},
    )
    columns = read_run(run).columns
    assert columns["tokens"].tolist() == [0, 50, 200]
    assert columns["seconds"].tolist() == [0, 0.5, 2.0]


# ---- in a real Chromium


@pytest.fixture(scope="module")
def browser() -> Any:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium: tools/system.sh chromium installs it")
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


def opened(browser: Any, url: str, width: int = 1280, scheme: str = "light") -> tuple[Any, list]:
    """A page, once it is drawn, and what its console says."""
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(url)
    tab.wait_for_selector("html[data-ready=yes]")
    return tab, said


DRAWN = """[...document.querySelectorAll('[data-chart]')].map(e => {
  const c = e.querySelector('canvas');
  const pixels = c ? c.getContext('2d').getImageData(0, 0, c.width, c.height).data : [];
  const colours = new Set();
  for (let i = 0; i < pixels.length; i += 4)
    if (pixels[i + 3] > 200) colours.add(pixels.slice(i, i + 3).map(v => v >> 4).join());
  return [e.dataset.chart, Number(e.dataset.points), colours.size];
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_chromium_draws_every_chart(browser: Any, tmp_path: Path, scheme: str) -> None:
    file = tmp_path / "report.html"
    folders = [write_run(tmp_path / name, 80, lr) for name, lr in (("one", 1e-3), ("two", 2e-3))]
    file.write_text(page(named_apart([read_run(folder) for folder in folders])))
    tab, said = opened(browser, file.as_uri(), scheme=scheme)
    tab.wait_for_timeout(300)
    drawn = {name: (points, colours) for name, points, colours in tab.evaluate(DRAWN)}
    assert {name: points for name, (points, _) in drawn.items()} == charts(file.read_text())
    assert all(colours >= 3 for _, colours in drawn.values())
    for button in ("[data-axis=tokens]", "[data-axis=seconds]", "#theme", "#reset"):
        tab.click(button)
    tab.click("[data-chart=loss] .log")
    tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    tab.evaluate("window.dispatchEvent(new Event('afterprint'))")
    tab.uncheck(".run input >> nth=0")  # leaves one run
    assert tab.get_attribute("[data-chart=loss]", "data-points") == "80"
    assert said == []


def test_a_drag_over_one_chart_zooms_all_and_hovering_shows_values(
    browser: Any, tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    file.write_text(page([read_run(write_run(tmp_path / "run", 80))]))
    tab, said = opened(browser, file.as_uri())
    tab.set_viewport_size({"width": 1280, "height": 3000})
    tab.wait_for_timeout(300)
    box = tab.locator("[data-chart=loss] .u-over").bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
    tab.wait_for_function(
        "/\\d/.test(document.querySelector('[data-chart=grad_norm] .u-legend').textContent)"
    )
    before = tab.locator("[data-chart=grad_norm]").screenshot()
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] / 1.5, box["y"] + 50, steps=4)
    tab.mouse.up()
    tab.mouse.move(2, 2)
    tab.wait_for_timeout(200)
    assert tab.locator("[data-chart=grad_norm]").screenshot() != before
    assert said == []


def test_a_page_is_usable_at_400_pixels(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page([read_run(write_run(tmp_path / "run", 80))]))
    tab, said = opened(browser, file.as_uri(), width=400)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    widths = tab.evaluate("[...document.querySelectorAll('canvas')].map(c => c.clientWidth)")
    assert len(widths) == 6 and all(300 < width <= 400 for width in widths)
    assert said == []


def test_a_hundred_thousand_steps_open_in_two_seconds(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page([read_run(write_run(tmp_path / "run", 100_000))]))
    seconds = []
    for _ in range(8):  # tests share their processors: it counts that it can be done
        begin = time.monotonic()
        tab, _ = opened(browser, file.as_uri())
        seconds.append(time.monotonic() - begin)
        assert tab.get_attribute("[data-chart=loss]", "data-points") == "100000"
        tab.close()
        if seconds[-1] < 2:
            break
    assert min(seconds) < 2


def wait_for_points(tab: Any, chart: str, points: int) -> None:
    tab.wait_for_function(
        f"document.querySelector('[data-chart={chart}]')?.dataset.points === '{points}'",
        timeout=20_000,
    )


def test_a_page_that_follows_a_run_shows_new_steps_and_new_charts_and_a_run_that_is_gone(
    browser: Any, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run", 10)  # nothing is validated yet
    with following(folder) as live:
        tab, said = opened(browser, live.url)
        other, _ = opened(browser, live.url)
        wait_for_points(tab, "loss", 10)
        assert tab.locator("[data-chart=val_loss]").count() == 0
        append(folder, {"step": 11, "loss": 3.0, "val_loss": 3.5})
        wait_for_points(tab, "loss", 11)
        wait_for_points(tab, "val_loss", 1)
        wait_for_points(other, "val_loss", 1)
        names = tab.evaluate(
            "[...document.querySelectorAll('[data-chart]')].map(e => e.dataset.chart)"
        )
        assert names[:2] == ["loss", "val_loss"]
        folder.rename(tmp_path / "elsewhere")
        tab.wait_for_function("document.querySelector('#live').textContent.includes('no such')")
        (tmp_path / "elsewhere").rename(folder)
        append(folder, {"step": 12, "loss": 3.0})
        wait_for_points(tab, "loss", 12)
        assert tab.inner_text("#live") == "live"
        assert said == []
    tab.wait_for_function("document.querySelector('#live').textContent.includes('has ended')")


def test_a_page_that_follows_a_run_leaves_tables_zoom_and_pointer_as_they_are(
    browser: Any, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run", 80)
    with following(folder) as live:
        tab, said = opened(browser, live.url)
        tab.set_viewport_size({"width": 1280, "height": 3000})
        tab.wait_for_timeout(300)
        tab.evaluate("document.querySelector('#details').firstElementChild.dataset.kept = 'yes'")
        box = tab.locator("[data-chart=loss] .u-over").bounding_box()
        middle = box["x"] + box["width"] / 2
        tab.mouse.move(middle, box["y"] + 50)
        tab.mouse.down()
        tab.mouse.move(middle + 200, box["y"] + 50, steps=4)
        tab.mouse.up()
        tab.evaluate("document.querySelector('[data-chart=loss] canvas').dataset.kept = 'yes'")
        append(folder, {"step": 81, "loss": 3.0, "grad_norm": 1.0})
        wait_for_points(tab, "loss", 81)
        assert tab.locator("[data-kept=yes]").count() == 2
        step = tab.inner_text("[data-chart=grad_norm] .u-legend .u-value >> nth=0")
        assert 40 <= int(step) <= 60  # the pointer's, not the newest
        assert said == []


def with_profile(folder: Path) -> Path:
    """A run with a profile of two operations and a machine's ceilings."""
    operations = [
        {"name": "gemm", "source": ["tinyllama/model/llama.py:54"], "calls": 2, "seconds": 0.3,
         "share": 0.6, "gflops": 80.0, "gb_per_second": 1.0},
        {"name": "gemm (backward)", "source": ["tinyllama/model/llama.py:54"], "calls": 4,
         "seconds": 0.1, "share": 0.2, "gflops": 60.0, "gb_per_second": 3.0},
        {"name": "launch gaps", "source": [], "calls": 0, "seconds": 0.1, "share": 0.2,
         "gflops": 0.0, "gb_per_second": 0.0},
    ]  # fmt: skip
    profile = {"step_seconds": 0.5, "operations": operations}
    (folder / "profile.json").write_text(json.dumps(profile))
    ceilings = {"float32_gflops": 100.0, "bfloat16_gflops": 200.0, "gb_per_second": 20.0}
    (folder / "roofline.json").write_text(json.dumps(ceilings))
    return folder


def test_a_profile_is_a_table_and_a_roofline(tmp_path: Path) -> None:
    text = page([read_run(with_profile(write_run(tmp_path / "run", 60)))])
    assert charts(text)["roofline"] == 2  # a gap computes nothing
    assert "Where a step&#x27;s 500.0 ms go: run" in text or "Where a step's 500.0 ms go" in text
    (run,) = embedded(text)["runs"]
    assert run["roofline"]["ceilings"]["gb_per_second"] == 20.0
    (forward, backward) = run["roofline"]["points"]
    assert (forward["x"], forward["y"], forward["backward"]) == (80.0, 80.0, False)
    assert (backward["x"], backward["y"], backward["backward"]) == (20.0, 60.0, True)


def test_a_damaged_profile_is_one_message(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 40)
    (folder / "profile.json").write_text('{"step_seconds": 1.0, "operations": [{"name": 3}]}')
    with pytest.raises(CheckpointError, match=r"profile\.json.*operations"):
        read_run(folder)


def test_pointing_at_the_roofline_and_at_an_anomaly_says_what_is_there(
    browser: Any, tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    file.write_text(page([read_run(with_profile(write_run(tmp_path / "run", 80)))]))
    tab, said = opened(browser, file.as_uri())
    tab.set_viewport_size({"width": 1280, "height": 4000})
    tab.wait_for_timeout(300)

    def tip_at(chart: str, share: float, wanted: str) -> str:
        """The box's text at a place of the chart's width where it says `wanted`."""
        box = tab.locator(f"[data-chart={chart}] .u-over").bounding_box()
        x = box["x"] + share * box["width"]
        for at in range(0, int(box["height"]), 4):
            tab.mouse.move(x, box["y"] + at)
            text = tab.locator(f"[data-chart={chart}] .tip").inner_text()
            if wanted in text:
                return text
        raise AssertionError(f"nothing says {wanted!r}")

    assert "the usual is 3" in tip_at("loss", 29 / 79, "step 30: loss 9")
    share = math.log10(80) / 3  # of the axis: decades around ridges and points, from 5 to 80
    text = tip_at("roofline", share, "gemm")
    assert "60 % of the step" in text and "tinyllama/model/llama.py:54" in text
    assert said == []


def test_a_printed_page_is_light_and_as_wide_as_the_paper(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page([read_run(with_profile(write_run(tmp_path / "run", 80)))]))
    tab, said = opened(browser, file.as_uri(), width=1400, scheme="dark")
    tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    tab.emulate_media(media="print")
    tab.set_viewport_size({"width": 718, "height": 900})  # A4 within Chromium's margins
    tab.wait_for_timeout(200)
    assert tab.get_attribute("html", "data-shown") == "light"
    assert tab.evaluate("document.documentElement.scrollWidth") <= 718
    inside = tab.evaluate(
        "[...document.querySelectorAll('.chart')].every(e => e.scrollWidth <= e.clientWidth)"
    )
    assert inside and said == []
