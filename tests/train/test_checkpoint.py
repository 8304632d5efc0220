"""Checkpoints that a kill, a full disk or a flipped bit cannot take away unnoticed."""

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tinyllama.errors import CheckpointError
from tinyllama.system import partials
from tinyllama.train import checkpoint, manifest
from tinyllama.train.checkpoint import (
    latest_valid,
    list_checkpoints,
    read_state,
    recover,
    save_checkpoint,
    step_name,
    verify,
    write_state,
)

ROOT = Path(__file__).resolve().parents[2]


def filler(step, text="data"):
    """A `write` that fills a folder as a run would, in small."""

    def write(folder):
        (folder / "model.safetensors").write_text(f"{text} of {step} " * 50)
        (folder / "nested").mkdir()
        (folder / "nested/part").write_text(text)
        write_state(folder, {"step": step})

    return write


def save(root, step, name=None, text="data", **options):
    return save_checkpoint(root, name or step_name(step), filler(step, text), **options)


def names(root):
    return sorted(path.name for path in Path(root).iterdir())


def tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in Path(root).rglob("*") if p.is_file()}


def refuse_exchange(monkeypatch):
    monkeypatch.setattr(checkpoint, "_exchange", lambda first, second: False)


def no_warning(message):
    raise AssertionError(message)


def test_manifest_names_every_file_with_its_checksum_and_size(tmp_path):
    folder = save(tmp_path / "run", 1000)
    assert folder == tmp_path / "run/step-00001000"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model.safetensors", "nested/part", "training_state.json"}
    for name, file in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert file == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    verify(folder)
    assert names(tmp_path / "run") == ["step-00001000"]
    assert read_state(folder) == {"step": 1000}


def test_digests_that_the_writer_gives_are_not_taken_again(tmp_path):
    def write(folder):
        (folder / "a").write_bytes(b"abc")
        return {"a": ("0" * 64, 3)}

    folder = save_checkpoint(tmp_path, "final", write)
    assert json.loads((folder / "manifest.json").read_text())["files"]["a"]["sha256"] == "0" * 64


@pytest.mark.parametrize(
    ("digests", "message"),
    [
        ({"a": ("0" * 64, 4)}, "a: 3 bytes on disk, 4 were written"),
        ({"b": ("0" * 64, 3)}, "b: missing right after it was written"),
    ],
)
def test_file_that_is_not_what_the_writer_says_fails_the_save(tmp_path, digests, message):
    def write(folder):
        (folder / "a").write_bytes(b"abc")
        return digests

    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, "final", write)
    assert names(tmp_path) == []


@pytest.fixture
def disk_events(monkeypatch):
    """Paths that are fsynced, and between them "rename" and "exchange"."""
    events = []

    def record(module, name, event):
        original = getattr(module, name)

        def wrapper(*arguments):
            events.append(event(*arguments))
            return original(*arguments)

        monkeypatch.setattr(module, name, wrapper)

    record(os, "fsync", lambda descriptor: Path(os.readlink(f"/proc/self/fd/{descriptor}")))
    record(os, "rename", lambda source, target: "rename")
    record(checkpoint, "_exchange", lambda first, second: "exchange")
    return events


def test_every_file_and_folder_is_on_disk_before_the_rename_and_the_parent_after(
    tmp_path, disk_events
):
    save(tmp_path, 1)
    renamed = disk_events.index("rename")
    files, folder = disk_events[: renamed - 1], disk_events[renamed - 1]
    assert {path.name for path in files} == {
        "model.safetensors",
        "part",
        "nested",
        "training_state.json",
        "manifest.json",
    }
    assert re.fullmatch(rf"\.step-00000001\.partial-{os.getpid()}-[-0-9a-f]+", folder.name)
    assert disk_events[renamed + 1 :] == [tmp_path]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_replacing_is_on_disk_before_the_old_one_is_deleted(
    tmp_path, monkeypatch, disk_events, exchange
):
    if not exchange:
        refuse_exchange(monkeypatch)
    save(tmp_path, 1, "final")
    disk_events.clear()
    save(tmp_path, 2, "final")
    staged = disk_events.index("rename")  # .final.next is whole
    swap = ["exchange"] if exchange else ["rename", "rename"]
    assert disk_events[staged + 1 :] == [tmp_path, *swap, tmp_path, "rename"]


DAMAGE = {
    "missing": (lambda f: (f / "nested/part").unlink(), r"nested/part: missing"),
    "truncated": (
        lambda f: os.truncate(f / "nested/part", 2),
        r"nested/part: truncated: 2 bytes, the manifest says 4",
    ),
    "longer": (
        lambda f: (f / "nested/part").write_text("datas"),
        r"nested/part: too long: 5 bytes, the manifest says 4",
    ),
    "changed": (
        lambda f: (f / "nested/part").write_text("dato"),
        rf"nested/part: changed: SHA-256 is {hashlib.sha256(b'dato').hexdigest()}, "
        rf"the manifest says {hashlib.sha256(b'data').hexdigest()}",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"manifest.json: missing"),
    "empty manifest": (lambda f: (f / "manifest.json").write_text(""), r"manifest.json: not JSON"),
    "list": (lambda f: (f / "manifest.json").write_text("[]"), r"manifest.json: must be a JSON"),
    "binary": (
        lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"),
        r"manifest.json: not JSON",
    ),
    "folder": (
        lambda f: ((f / "nested/part").unlink(), (f / "nested/part").mkdir()),
        r"nested/part: missing",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_the_checkpoint_before_is_used(tmp_path, case):
    damage, message = DAMAGE[case]
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    damage(second)
    with pytest.raises(CheckpointError, match=f"step-00000002/{message}"):
        verify(second)
    warnings = []
    assert latest_valid(tmp_path, warnings.append) == first
    assert len(warnings) == 1
    assert re.search(rf"step-00000002/{message}", warnings[0])
    assert "step-00000002: damaged, the checkpoint before it is tried" in warnings[0]


def test_every_damaged_file_is_named(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "nested/part").unlink()
    os.truncate(folder / "model.safetensors", 0)
    with pytest.raises(CheckpointError) as error:
        verify(folder)
    assert len(str(error.value).split("\n")) == 2


def test_manifest_truncated_anywhere_or_with_any_byte_changed_is_detected(tmp_path):
    folder = save_checkpoint(tmp_path, "final", lambda folder: (folder / "a").touch())
    path = folder / "manifest.json"
    data = path.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError, match=r"manifest\.json: "):
            verify(folder)
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match=r"manifest\.json: "):
            verify(folder)
    path.write_bytes(data)
    verify(folder)


def test_manifest_of_another_format_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "manifest.json").write_text('{"format": "other-2"}')
    with pytest.raises(CheckpointError, match=r"format: got 'other-2', must be tinyllama-checkpoi"):
        verify(folder)


def test_without_a_checkpoint_there_is_no_latest(tmp_path):
    assert latest_valid(tmp_path, no_warning) is None
    assert latest_valid(tmp_path / "none", no_warning) is None
    assert list_checkpoints(tmp_path / "none") == []


def test_all_damaged_gives_none_and_names_each(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "model.safetensors").unlink()
    warnings = []
    assert latest_valid(tmp_path, warnings.append) is None
    assert [re.search(r"step-\d+", text)[0] for text in warnings] == [
        "step-00000002",
        "step-00000001",
    ]


def test_order_is_by_steps_and_final_stands_after_the_step_it_was_saved_at(tmp_path):
    for step in (100_000_000, 20, 3):
        save(tmp_path, step)
    save(tmp_path, 20, "final")
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-00000099").write_text("a file")
    order = ["step-00000003", "step-00000020", "final", "step-100000000"]
    assert [path.name for path in list_checkpoints(tmp_path)] == order
    assert latest_valid(tmp_path, no_warning).name == "step-100000000"
    (tmp_path / "final/training_state.json").write_text("{")
    assert list_checkpoints(tmp_path)[-1].name == "final"  # unknown: tried first, and refused
    warnings = []
    assert latest_valid(tmp_path, warnings.append).name == "step-100000000"
    assert "final/training_state.json: truncated" in warnings[0]


def test_pruning_keeps_the_newest_steps_and_never_final(tmp_path):
    save(tmp_path, 1, "final", keep_last_n=2)
    for step in range(1, 6):
        save(tmp_path, step, keep_last_n=2)
    assert names(tmp_path) == ["final", "step-00000004", "step-00000005"]
    save(tmp_path, 5, "final", keep_last_n=1)
    assert names(tmp_path) == ["final", "step-00000005"]
    save(tmp_path, 6)
    assert names(tmp_path) == ["final", "step-00000005", "step-00000006"]


def test_pruning_neither_counts_nor_removes_what_is_damaged_or_foreign(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    os.truncate(tmp_path / "step-00000003/model.safetensors", 1)
    for name in ("step-00000000-copy", "step-1", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000000").mkdir()
    save(tmp_path, 4, keep_last_n=2)
    assert names(tmp_path) == sorted(
        ["mine", "step-1", "step-00000000", "step-00000000-copy"]
        + [step_name(step) for step in (2, 3, 4)]
    )


def test_pruning_leaves_what_was_just_saved_below_steps_of_a_former_future(tmp_path):
    for step in (8, 9):
        save(tmp_path, step)
    assert save(tmp_path, 3, keep_last_n=1).is_dir()
    assert names(tmp_path) == ["step-00000003", "step-00000009"]


def test_failed_save_leaves_everything_as_it_was(tmp_path):
    def write(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("boom")

    save(tmp_path, 1)
    save(tmp_path, 1, "final")
    before = tree(tmp_path)
    for name in ("step-00000002", "final"):
        with pytest.raises(RuntimeError, match="boom"):
            save_checkpoint(tmp_path, name, write, 1)
        assert tree(tmp_path) == before
        assert names(tmp_path) == ["final", "step-00000001"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_saving_again_onto_a_name_replaces_the_whole_folder(tmp_path, monkeypatch, exchange):
    if not exchange:
        refuse_exchange(monkeypatch)
    folder = save(tmp_path, 1, "final", "old")
    (folder / "extra").write_text("of the old one")
    save(tmp_path, 2, "final", "new")
    assert read_state(folder) == {"step": 2}
    assert not (folder / "extra").exists()
    assert (folder / "nested/part").read_text() == "new"
    verify(folder)
    assert names(tmp_path) == ["final"]


def test_exchange_of_names_works_here_and_tells_when_it_cannot(tmp_path, monkeypatch):
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    (second / "in").mkdir(parents=True)
    assert checkpoint._exchange(first, second)
    assert (first / "in").is_dir()
    with pytest.raises(OSError, match="No such file"):
        checkpoint._exchange(first, tmp_path / "none")
    monkeypatch.setattr(checkpoint.ctypes, "CDLL", lambda *_, **__: SimpleNamespace())
    assert not checkpoint._exchange(first, second)
    failing = SimpleNamespace(renameat2=lambda *_: -1)
    monkeypatch.setattr(checkpoint.ctypes, "CDLL", lambda *_, **__: failing)
    monkeypatch.setattr(checkpoint.ctypes, "get_errno", lambda: errno.EINVAL)
    assert not checkpoint._exchange(first, second)


def test_what_is_no_checkpoint_is_put_aside_and_kept(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final/notes").write_text("mine")
    (tmp_path / "final.aside-1").write_text("taken")
    save(tmp_path, 1, "final")
    verify(tmp_path / "final")
    assert (tmp_path / "final.aside-2/notes").read_text() == "mine"
    assert names(tmp_path) == ["final", "final.aside-1", "final.aside-2"]


def test_recovery_rules_for_a_kill_between_the_renames(tmp_path):
    for name, step in (("final", 1), (".final.next", 2), (".final.old", 1)):
        save(tmp_path, step, name="final")
        (tmp_path / "final").rename(tmp_path / f"{name}-kept")
    for kept in tmp_path.glob("*-kept"):
        kept.rename(kept.with_name(kept.name.removesuffix("-kept")))
    # All three: the new one was not given the name, or already has it; the name decides.
    assert {path.name for path in recover(tmp_path)} == {".final.next", ".final.old"}
    assert names(tmp_path) == ["final"]
    assert read_state(tmp_path / "final") == {"step": 1}
    # Only the two hidden ones: killed between two renames; the new one gets the name.
    shutil.copytree(tmp_path / "final", tmp_path / ".final.old")
    save(tmp_path, 2, "final")
    (tmp_path / "final").rename(tmp_path / ".final.next")
    shutil.rmtree(tmp_path / ".final.old", ignore_errors=True)
    shutil.copytree(tmp_path / ".final.next", tmp_path / ".final.old")
    write_state(tmp_path / ".final.old", {"step": 1})
    assert {path.name for path in recover(tmp_path)} == {".final.old"}
    assert read_state(tmp_path / "final") == {"step": 2}
    assert names(tmp_path) == ["final"]


def test_recovery_removes_partials_of_dead_processes_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    place = f"{partials._boot()}-{partials._namespace()}-0123abcd"
    for name in (
        f".final.partial-{dead.pid}-{place}",
        f".step-00000001.partial-{os.getpid()}-{place}",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    foreign = [".mine.old", ".mine.next", f".final.partial-{os.getppid()}", "mine"]
    for name in foreign:
        (tmp_path / name).mkdir()
    save(tmp_path, 1, "final")
    assert names(tmp_path) == sorted([*foreign, "final"])


@pytest.mark.parametrize("fails", ["rename", "delete"])
def test_an_old_checkpoint_that_cannot_be_removed_costs_one_notice(
    tmp_path, monkeypatch, capsys, fails
):
    """As an immutable folder, or on NFS one with a reader."""
    save(tmp_path, 1)
    rename, delete = os.rename, partials._delete

    def refuse(path):
        if "step-00000001" in str(path):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), "inner")

    if fails == "rename":
        monkeypatch.setattr(os, "rename", lambda a, b: (refuse(a), rename(a, b)))
    monkeypatch.setattr(partials, "_delete", lambda path: (refuse(path), delete(path)))
    for step in (2, 3, 4):
        verify(save(tmp_path, step, keep_last_n=1))
    assert [n for n in names(tmp_path) if "step-00000001" not in n] == ["step-00000004"]
    assert capsys.readouterr().err == (
        f"{tmp_path}/step-00000001: cannot be removed and stays: Device or resource busy; "
        "the run goes on\n"
    )
    recover(tmp_path)
    monkeypatch.undo()
    if fails == "delete":
        recover(tmp_path)
        assert names(tmp_path) == ["step-00000004"]


def test_a_replaced_checkpoint_that_cannot_be_removed_is_replaced(tmp_path, monkeypatch, capsys):
    save(tmp_path, 1, "final")

    def busy(path):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(partials, "_delete", busy)
    assert read_state(save(tmp_path, 2, "final"))["step"] == 2
    assert "cannot be removed and stays" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/../../outside", "a//b", "", ".", "a\x1b[2J", "a\\b"]
)
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path, name):
    folder = save(tmp_path, 1)
    (tmp_path / "outside").write_text("x")
    entry = {"sha256": hashlib.sha256(b"x").hexdigest(), "size": 1}
    spelled = manifest._spelled({"format": "tinyllama-checkpoint-1", "files": {name: entry}})
    (folder / "manifest.json").write_bytes(spelled)
    with pytest.raises(CheckpointError, match="is not the name of a file in the folder") as error:
        verify(folder)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    "entry",
    [
        [],
        {"sha256": "0" * 64},
        {"sha256": 5, "size": 1},
        {"sha256": "0" * 63, "size": 1},
        {"sha256": "0" * 64, "size": "1"},
        {"sha256": "0" * 64, "size": -1},
        {"sha256": "0" * 64, "size": 10**400},
        {"sha256": "0" * 64, "size": 1, "x" * 10**6: 1},
    ],
)
def test_a_manifest_with_values_of_other_kinds_is_refused_in_a_short_line(tmp_path, entry):
    folder = save(tmp_path, 1)
    spelled = manifest._spelled({"format": "tinyllama-checkpoint-1", "files": {"a": entry}})
    (folder / "manifest.json").write_bytes(spelled)
    with pytest.raises(CheckpointError, match=r"manifest\.json: ") as error:
        verify(folder)
    assert len(str(error.value)) < len(str(folder)) + 250


@pytest.mark.parametrize(
    "changes",
    [
        {"step": True},
        {"step": -1},
        {"step": 10**30},
        {"step": 1.5},
        {"data": []},
        {"data": {"epoch": [0]}},
        {"micro_batch_size": "4"},
        {"micro_batch_size": 0},
        {"made_with": {"training.seed": {}}},
        {"schedule_anchor": {"step": 3}},
        {"schedule_anchor": {"step": 3, "share": "all"}},
        {"unvalidated": 1},
        {"unvalidated": {"step": 1}},
        {"was_last": "no"},
    ],
)
def test_a_state_with_values_of_other_kinds_is_refused(tmp_path, changes):
    text = json.dumps({"step": 1, "added by a later version": {"x": [1]}})
    (tmp_path / "training_state.json").write_text(text)
    assert read_state(tmp_path) == json.loads(text)
    (tmp_path / "training_state.json").write_text(json.dumps({"step": 1} | changes))
    with pytest.raises(CheckpointError, match=r"training_state\.json: "):
        read_state(tmp_path)


@pytest.mark.parametrize("data", [b"[" * 10**6, b'{"step": 1' + b"0" * 10**6 + b"}", b"\xff"])
def test_a_state_of_any_bytes_is_refused_in_a_short_line(tmp_path, data):
    (tmp_path / "training_state.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"training_state\.json: ") as error:
        read_state(tmp_path)
    assert len(str(error.value)) < len(str(tmp_path)) + 350


def test_a_disk_that_is_full_when_the_folder_is_made_says_so(tmp_path, monkeypatch):
    def full(path, mode=0o777):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(CheckpointError, match=r"run/final: not enough space: needs about 9 bytes"):
        save(tmp_path / "new" / "run", 1, "final", needed_bytes=9)


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(tmp_path, "final", no_warning, needed_bytes=1000)
    assert str(error.value) == (
        f"{tmp_path}/final: not enough space: needs about 1000 bytes, 999 bytes are free; "
        "nothing of it was kept"
    )
    save(tmp_path, 2, needed_bytes=999)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", ["final", "step-00000002"])
def test_disk_that_fills_up_while_writing_leaves_what_was_there(tmp_path, monkeypatch, code, name):
    def write(folder):
        (folder / "big").write_bytes(b"x" * 500)
        raise OSError(code, os.strerror(code), str(folder / "big"))

    save(tmp_path, 1)
    save(tmp_path, 1, "final")
    before = tree(tmp_path)
    free = iter([7000, 300, 7000, 300])  # somebody else fills it: before, after, before, after
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=next(free)))
    with pytest.raises(CheckpointError) as error:
        save_checkpoint(tmp_path, name, write, 1, needed_bytes=6000)
    assert str(error.value).startswith(
        f"{tmp_path}/{name}: not enough space: needs about 6000 bytes, 800 bytes are free"
    )
    with pytest.raises(CheckpointError, match="needs more than 500 bytes, 800 bytes are free"):
        save_checkpoint(tmp_path, name, write, 1, needed_bytes=400)
    assert tree(tmp_path) == before
    assert names(tmp_path) == ["final", "step-00000001"]


def test_disk_that_is_full_at_the_last_fsync_is_told_too(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match=r"final: not enough space: needs about 9 bytes"):
        save(tmp_path, 1, "final", needed_bytes=9)
    assert names(tmp_path) == []


def test_other_errors_of_the_system_name_the_checkpoint(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/final: cannot be saved: .*Not a directory"):
        save(tmp_path / "file", 1, "final")


def test_state_must_hold_a_step_and_only_what_json_can(tmp_path):
    with pytest.raises(KeyError):
        write_state(tmp_path, {"epoch": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_state(tmp_path, {"step": 1, "loss": float("nan")})
    with pytest.raises(CheckpointError, match=r"training_state.json: missing"):
        read_state(tmp_path)


# A process that saves without end, and says so each time a save has returned.
FOREVER = """
import os, sys
from pathlib import Path
from tinyllama.train import checkpoint

root, first = Path(sys.argv[1]), int(sys.argv[2])
for step in range(first, first + 100_000):
    def write(folder):
        for part in range(4):
            (folder / f"part{part}").write_bytes(os.urandom(20_000))
        checkpoint.write_state(folder, {"step": step})

    for name in (checkpoint.step_name(step), "final"):
        checkpoint.save_checkpoint(root, name, write, 2)
        os.write(1, f"{step}\\n".encode())
"""

# Forks processes that each save `final` and then a step that prunes another, and kill themselves
# at the N-th thing they ask of the file system, N = 1, 2, ... until one gets through. No fsync:
# it is for a power cut, which no test makes.
SUICIDAL = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from tinyllama.train import checkpoint

base = Path(sys.argv[1])
exchange = checkpoint._exchange if sys.argv[2] == "exchange" else lambda *names: False
watched = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "exchange"}

def audited_exchange(*names):
    sys.audit("exchange")
    return exchange(*names)

def save(root, moment):
    events = itertools.count(1)

    def hook(event, args):
        if event in watched and next(events) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(folder):
        (folder / "part").write_text("of the third save")
        checkpoint.write_state(folder, {"step": 3})

    sys.addaudithook(hook)
    checkpoint._exchange = audited_exchange
    os.fsync = lambda descriptor: None
    for name in ("final", "step-00000003"):
        checkpoint.save_checkpoint(root, name, write, 2)
        os.write(1, f"{root.name} {name}\\n".encode())

for moment in itertools.count(1):
    root = base.with_name(f"run{moment}")
    shutil.copytree(base, root)
    if (child := os.fork()) == 0:
        save(root, moment)
        os._exit(0)
    if os.waitpid(child, 0)[1] != signal.SIGKILL:
        break
"""


def assert_survived(root, saved_step):
    """The last save that returned is there or a newer one, and everything that is listed is whole,
    before and after recovery, which leaves nothing hidden."""
    for _ in range(2):
        latest = latest_valid(root, no_warning)
        assert saved_step == 0 or read_state(latest)["step"] >= saved_step
        for folder in list_checkpoints(root):
            verify(folder)
        recover(root)
    assert not [name for name in names(root) if name.startswith(".")]


def test_killed_at_random_moments_the_last_complete_checkpoint_is_whole(tmp_path):
    rng = random.Random(0)
    step = 0
    for _ in range(20):
        command = [sys.executable, "-c", FOREVER, str(tmp_path), str(step + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
            first = process.stdout.readline()  # at least one save, so that each kill meets work
            time.sleep(rng.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
            said = (first + process.stdout.read()).split(b"\n")
        step = int(said[-2])
        assert_survived(tmp_path, step)
    assert step > 20


@pytest.mark.parametrize("mode", ["exchange", "two renames"])
def test_killed_at_every_file_operation_the_last_complete_checkpoint_is_whole(tmp_path, mode):
    base = tmp_path / "base"
    for step in (1, 2):
        save(base, step)
    save(base, 2, "final")
    command = [sys.executable, "-c", SUICIDAL, str(base), mode]
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, check=True, text=True)
    said = done.stdout.split("\n")
    runs = sorted(tmp_path.glob("run*"), key=lambda path: int(path.name[3:]))
    for root in runs:
        if mode == "exchange":  # the name is never absent
            verify(root / "final")
        assert_survived(root, 3 if f"{root.name} final" in said else 2)
    assert len(runs) > 40
    assert f"{runs[-1].name} step-00000003" in said
    assert names(runs[-1]) == ["final", "step-00000002", "step-00000003"]
    # The kills came at moments that matter: among them, both old and new `final` were found.
    assert {read_state(root / "final")["step"] for root in runs} == {2, 3}
