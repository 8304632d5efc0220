"""Small JSON files: whatever bytes they hold, values of the right kinds or one short message."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tinyllama.data.corpus import _Meta
from tinyllama.data.files import _Digests
from tinyllama.errors import CheckpointError, TinyllamaError
from tinyllama.observe.metrics import MetricsLog, read_metrics
from tinyllama.system.checked import _Checked
from tinyllama.system.untrusted import parse_json, printable, read_json_file
from tinyllama.train.checkpoint import read_state
from tinyllama.train.manifest import read_manifest, write_manifest

STATE = {
    "step": 4,
    "data": {"data": "ab", "seed": 3, "shuffle": True, "epoch": 0, "window": 2},
    "micro_batch_size": 2,
    "made_with": {"training.seed": 3, "lora.target_modules": ["q_proj"], "device": "CPU"},
    "schedule_anchor": {"step": 2, "share": 0.5},
    "unvalidated": {"step": 4, "loss": 2.5, "lr": 0.1, "epoch": 1},
    "was_last": False,
}
SPLICED = (
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b'"\\u001b[2J"',
    b"[" * 3000,
    b"{}",
    b"9" * 400,
    b"\xff",
)


class Sizes(msgspec.Struct, forbid_unknown_fields=True):
    width: int


def changed(data: bytes, chance: random.Random) -> bytes:
    """A few random edits."""
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data) + 1)
        until = min(len(data), at + chance.choice([0, 1, 1, 3, 20]))
        new = chance.choice([*SPLICED, bytes([chance.randrange(256)]), b""])
        data = data[:at] + new + data[until:]
    return data


def quiet(line: str) -> None:
    assert len(line) < 700 and line.isprintable()


def metrics_of(path: Path) -> object:
    MetricsLog(path, 3, notice=quiet).close()
    return read_metrics(path)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "state": ("training_state.json", lambda path: read_state(path.parent)),
    "manifest": ("manifest.json", lambda path: read_manifest(path.parent)),
    "metrics": ("metrics.jsonl", metrics_of),
    "strict metrics": ("metrics.jsonl", read_metrics),
    "tokens": ("meta.json", lambda path: read_json_file(path, _Meta, TinyllamaError)),
    "digests": ("digests.json", lambda path: read_json_file(path, _Digests, TinyllamaError)),
    "checks": ("checked.json", lambda path: read_json_file(path, _Checked, TinyllamaError)),
}


def example(name: str, folder: Path) -> bytes:
    if name == "manifest.json":
        (folder / "model.safetensors").write_bytes(b"x")
        write_manifest(folder, {})
        return (folder / name).read_bytes()
    if name == "training_state.json":
        return json.dumps(STATE, indent=2).encode()
    if name == "metrics.jsonl":
        lines = [{"step": s, "loss": 2.0, "lr": 0.1, "memory_bytes": 10} for s in range(1, 5)]
        return "".join(json.dumps(line) + "\n" for line in lines).encode()
    values: dict[str, object] = {
        "meta.json": _Meta("uint16", 9, 1, 0, 20, 1, 2, "0" * 64, "0" * 64),
        "digests.json": {"files": {"/a": [[1, 2, 3, 4], "0" * 64]}, "sum": ""},
        "checked.json": {"entries": {"sha256\n/a": [[1, 2, 3, 4, 5], "0" * 64, 1.5]}, "sum": ""},
    }
    return msgspec.json.encode(values[name])


@pytest.mark.parametrize("reader", READERS)
def test_no_bytes_lead_to_more_than_a_short_message(tmp_path: Path, reader: str) -> None:
    name, read = READERS[reader]
    path = tmp_path / name
    whole = example(name, tmp_path)
    path.write_bytes(whole)
    read(path)
    chance, refused = random.Random(7), 0
    for _ in range(600):
        path.write_bytes(changed(whole, chance))
        try:
            read(path)
        except TinyllamaError as error:
            refused += 1
            assert len(str(error)) < len(str(tmp_path)) + 400
            assert "\x1b" not in str(error)
        for aside in tmp_path.glob("*.aside-*"):
            aside.unlink()
    assert refused > 200 or reader == "metrics"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"width": 3}', None),
        (b'{"width": "3"}', "file: width: expected int, got str"),
        (b'{"width": 3, "height": 2}', "file: object contains unknown field height"),
        (b"{}", "file: object missing required field width"),
        (b"[]", "file: must be a JSON object"),
        (b"", "file: not JSON, so it is damaged or truncated: "),
        (b"[" * 100_000, "file: must be a JSON object"),
        (b'{"a": ' + b"[" * 100_000, "file: "),
        (b'{"' + b"x" * 10**6 + b'": 1}', "file: object contains unknown field xxx"),
    ],
)
def test_the_message_names_the_place_and_is_short(text: bytes, message: str | None) -> None:
    if message is None:
        assert parse_json(text, Sizes, CheckpointError, "file").width == 3
        return
    with pytest.raises(CheckpointError) as refused:
        parse_json(text, Sizes, CheckpointError, "file")
    assert str(refused.value).startswith(message) and len(str(refused.value)) < 300


def test_what_is_no_small_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b'{"width": 3}' + b" " * 100)
    for name, words in (
        ("none", "none: missing"),
        ("pipe", "pipe: is no regular file"),
        ("large", "large: 112 bytes, at most 50 are allowed"),
        (".", "is no regular file"),
    ):
        with pytest.raises(CheckpointError, match=words):
            read_json_file(tmp_path / name, Sizes, CheckpointError, 50)


def test_text_for_a_message_is_short_and_printable() -> None:
    assert printable("plain") == "plain"
    assert printable("a\x1b[31m\nb\u202e") == "a\\x1b[31m\\nb\\u202e"
    assert printable("x" * 300) == "x" * 117 + "..."
    assert printable("\x1b" * 150) == ("\\x1b" * 50)[:117] + "..."
