"""Runs of strangers that are reported: one line at most, short work, nothing touched elsewhere."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from processor_time import within
from runs_helpers import cli, finished_run

pytest.importorskip("sklearn")

from test_report import write_run

from tinyllama.errors import CheckpointError
from tinyllama.observe.samples import SAMPLES, forget_after
from tinyllama.reports.analyze import document_lengths
from tinyllama.reports.page import page
from tinyllama.reports.runs import read_run
from tinyllama.system.memory import resident_bytes

ESCAPE = "\x1b[2J\x9b31m\u202e"
OPERATION: dict[str, Any] = {
    "name": f"k{ESCAPE}", "source": [ESCAPE], "calls": 2, "share": 0.1, "gb_per_second": 2.0,
}  # fmt: skip


def metrics(folder: Path, *lines: object) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def anomaly(**changes: object) -> dict[str, object]:
    note = {"kind": "spike", "series": "loss", "action": "note"} | changes
    return {"step": 99, "loss": 1.0, "anomalies": [note]}


def config(text: str) -> Any:
    return lambda folder: (folder / "config.toml").write_text(text)


def content(name: str, data: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(data)


BAD = {
    "config, deep": config("a = " + "[" * 100_000),
    "config, a long key": config("a." * 50_000 + "a = 1"),
    "config, escapes": config(f"{ESCAPE}"),
    "config, 2 MB": config("#" * 2_000_000),
    "a long kind": lambda f: metrics(f, anomaly(kind="k" * 1000)),
    "a long path": lambda f: metrics(f, anomaly(documents=["d" * 6000])),
    "many documents": lambda f: metrics(f, anomaly(documents=["d"] * 1000)),
    "a layer's long name": lambda f: metrics(f, {"step": 99, "update_ratios": {"x" * 999: 1.0}}),
    "many layers": lambda f: metrics(
        f, {"step": 99, "update_ratios": {str(n): 1.0 for n in range(600)}}
    ),
    "an anomaly of text": lambda f: metrics(f, anomaly(value=ESCAPE)),
    "a rollback to nowhere": lambda f: metrics(
        f, {"step": 99, "rolled_back": {"from": -1, "to": 0}}
    ),
    "profile, 15 MB": content("profile.json", b'{"a": [' + b"[]," * 5_000_000 + b"[]]}"),
    "profile, deep": content("profile.json", b"[" * 900_000),
    "machine, 15 MB": content("machine.json", b'{"a": [' + b"[]," * 5_000_000 + b"[]]}"),
    "samples, deep": content(SAMPLES, b"[" * 900_000 + b"\n"),
    "samples, a line of 40 MB": content(SAMPLES, b"x" * 40_000_000 + b"\n"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_run_is_refused_in_one_short_line(case: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 40)
    BAD[case](folder)
    begun, before = time.process_time(), resident_bytes(peak=True)
    with pytest.raises(CheckpointError) as caught:
        read_run(folder)
    message = str(caught.value)
    assert message.isprintable() and str(folder) in message
    assert len(message) < 400 + len(str(folder))
    assert time.process_time() - begun < within(1)
    assert resident_bytes(peak=True) - before < 200 << 20


# What a link may lead to, as the file it stands for would be.
SECRETS = {
    "config.toml": "[SECRET]\nkey = 'SECRET'\n",
    "machine.json": '{"processor": "SECRET"}',
    "profile.json": json.dumps(
        {"step_seconds": 1.0, "operations": [OPERATION | {"name": "SECRET"}]}
    ),
    "roofline.json": '{"float32_gflops": 1.0, "bfloat16_gflops": 1.0, "gb_per_second": 7.0}',
    SAMPLES: '{"step": 1, "prompt": "", "text": "SECRET"}\n',
}


def test_links_and_pipes_in_a_run_are_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    for name, text in SECRETS.items():
        secret.write_text(text)
        for kind in ("link", "pipe"):
            folder = write_run(tmp_path / f"{name} {kind}", 40)
            (folder / name).unlink(missing_ok=True)
            if kind == "pipe":
                os.mkfifo(folder / name)
            else:
                (folder / name).symlink_to(secret)
            try:
                text = page([read_run(folder)])
            except CheckpointError as error:
                text = str(error)
            assert "SECRET" not in text


def test_samples_of_a_run_are_of_bounded_number_and_length(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 40)
    line = json.dumps({"step": 2, "prompt": "<", "text": "<" + "t" * 100_000}) + "\n"
    (folder / SAMPLES).write_text(line * 100 + '{"step":2,"prompt":"","text":""}\n' * 500_000)
    begun, before = time.process_time(), resident_bytes(peak=True)
    run = read_run(folder)
    assert len(run.samples) == 1000
    assert resident_bytes(peak=True) - before < 200 << 20
    assert time.process_time() - begun < within(2)
    (folder / SAMPLES).write_text(line * 100)
    text = page([read_run(folder)])
    assert len(text) < 1_500_000 and "<b>&lt;</b>ttt" in text and "ttt...</pre>" in text


def test_of_long_samples_the_newest_are_shown_and_none_is_lost(tmp_path: Path) -> None:
    """A long run writes more of them than a page shows."""
    folder = write_run(tmp_path / "run", 40)
    lines = [
        json.dumps({"step": step, "prompt": "", "text": f"{step} " + "t" * 100_000}) + "\n"
        for step in range(1, 401)
    ]
    (folder / SAMPLES).write_text("".join(lines))  # 40 MB
    shown = [sample.step for sample in read_run(folder).samples]
    assert shown == [*range(401 - len(shown), 401)] and 300 < len(shown) < 400
    forget_after(folder, 399)
    assert (folder / SAMPLES).read_text() == "".join(lines[:399])
    assert not (folder / f"{SAMPLES}.aside-1").exists()


def test_an_intensity_that_no_page_can_hold_is_left_out(tmp_path: Path) -> None:
    folder = profiled(write_run(tmp_path / "run", 40), gflops=1e29, gb_per_second=1e-300)
    run = read_run(folder)
    assert run.profile is not None and run.roofline_points == []
    assert ":Infinity" not in page([run])  # which is no JSON


def profiled(folder: Path, **changes: object) -> Path:
    """A profile of two clear groups of operations, whose names a terminal would act on."""
    operations = [
        OPERATION | {"seconds": 1.0 + 99 * (n % 2), "gflops": 1 + 999 * (n % 2)} | changes
        for n in range(12)
    ]
    profile = {"step_seconds": 600.0, "operations": operations}
    (folder / "profile.json").write_text(json.dumps(profile))
    return folder


def test_names_of_a_profile_reach_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = profiled(write_run(tmp_path / "run", 120))
    assert cli("analyze", folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(r"per call: k\x1b[2J\x9b31m\u202e" in line for line in lines)
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (10**400, "number out of range"),
        (1e31, "expected float <= 1e+30"),
        (-1.0, "expected float >= 0.0"),
        ("many", "expected float, got str"),
    ],
)
def test_numbers_of_a_profile_that_cannot_be_are_refused(
    tmp_path: Path, value: object, why: str
) -> None:
    folder = profiled(write_run(tmp_path / "run", 120), seconds=value)
    with pytest.raises(CheckpointError) as refused:
        read_run(folder)
    place = "" if value == 10**400 else "operations[0].seconds: "
    assert str(refused.value).startswith(f"{folder / 'profile.json'}: {place}")
    assert why in str(refused.value)


def test_the_work_does_not_follow_the_last_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 40)
    (folder / "config.toml").write_text((finished_run() / "config.toml").read_text())
    for path in finished_run().glob("final/*"):
        (folder / "final").mkdir(exist_ok=True)
        (folder / "final" / path.name).write_bytes(path.read_bytes())
    assert document_lengths(read_run(folder)) is not None
    metrics(folder, {"step": 10**15, "loss": 1.0})
    assert document_lengths(read_run(folder)) is None


def test_a_cache_that_a_run_names_is_not_made(tmp_path: Path) -> None:
    """Its configuration may name any folder of this user."""
    folder = write_run(tmp_path / "run", 40)
    text = (finished_run() / "config.toml").read_text()
    elsewhere = tmp_path / "elsewhere"
    lines = [line for line in text.splitlines() if not line.startswith("cache_dir")]
    place = lines.index("[data]") + 1
    lines.insert(place, f"cache_dir = {json.dumps(str(elsewhere))}")
    (folder / "config.toml").write_text("\n".join(lines))
    for path in finished_run().glob("final/*"):
        (folder / "final").mkdir(exist_ok=True)
        (folder / "final" / path.name).write_bytes(path.read_bytes())
    for there in ((), (".",), (".", "digests.json")):  # a cache that holds other texts, too
        if "." in there:
            elsewhere.mkdir(exist_ok=True)
        if "digests.json" in there:
            (elsewhere / "digests.json").write_text("{}")
        assert document_lengths(read_run(folder)) is None
        left = os.listdir(elsewhere) if elsewhere.exists() else []
        assert left == list(there[1:])


def test_every_value_that_toml_has_is_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 40)
    (folder / "config.toml").write_text(
        f"[data]\nday = 1979-05-27\nat = 07:32:00\nwide = 0x{'f' * 5000}\nno = nan\n"
        f'some = ["<b>", 1]\ntext = "\\u001b[2J"\n'
    )
    text = page([read_run(folder)])
    for shown in ("1979-05-27", "07:32:00", "0xfff", "nan", "&lt;b&gt;", r"\u001b[2J"):
        assert f">{shown}" in text or f"{shown}&quot;" in text
