"""Who may remove an unfinished file: not another process, container or host that works beside its
owner, and whoever comes after a kill."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs_helpers import environment

from tinyllama.system import partials
from tinyllama.system.files import atomic_directory, atomic_write
from tinyllama.system.partials import discard, remove_partials

NEW_NAME = ".step-1.partial-{process}-{boot}-{namespace}-0123abcd"
# Fills a folder and waits; with "without locks", as on a file system that has none.
WRITER = """
import sys, time
from tinyllama.system import partials
from tinyllama.system.files import atomic_directory
if "without locks" in sys.argv:
    partials.fcntl = None
with atomic_directory(sys.argv[1]) as folder:
    (folder / "half").touch()
    print(folder.name, flush=True)
    time.sleep(600)
"""


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def dead_process_id() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        return process.pid


def name(process: int, boot: str | None = None, namespace: str | None = None) -> str:
    return NEW_NAME.format(
        process=process,
        boot=boot or partials._boot(),
        namespace=namespace or partials._namespace(),
    )


def left_behind(folder: Path, name: str, hours: float = 0) -> Path:
    """A folder with a file in it, both written so long ago."""
    (folder / name).mkdir()
    (folder / name / "half").touch()
    for path in (folder / name / "half", folder / name):
        os.utime(path, (time.time() - 3600 * hours,) * 2)
    return folder / name


def writer(folder: Path, *words: str, prefix: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", WRITER, str(folder / "step-1"), *words],
        env=environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().startswith(".step-1.partial-")
    return process


def end(process: "subprocess.Popen[str]") -> None:
    with process:
        process.kill()


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partials, "fcntl", None)


@pytest.mark.parametrize("words", [(), ("without locks",)], ids=["locks", "no locks"])
def test_a_partial_stays_while_its_process_lives_and_goes_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    if words:
        without_locks(monkeypatch)
    process = writer(tmp_path, *words)
    assert remove_partials(tmp_path) == []
    partial, half = contents(tmp_path)
    end(process)
    assert remove_partials(tmp_path) == [tmp_path / partial]
    assert half == f"{partial}/half" and contents(tmp_path) == []


def can_unshare() -> bool:
    words = ["unshare", "--fork", "--pid", "--mount-proc", "--kill-child", "true"]
    return shutil.which("unshare") is not None and subprocess.run(words).returncode == 0


@pytest.mark.parametrize("words", [(), ("without locks",)], ids=["locks", "no locks"])
def test_a_container_with_process_numbers_of_its_own_keeps_its_partials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """In it the writer is process 1 or 2, which says nothing here."""
    if not can_unshare():
        pytest.skip("a namespace of process numbers needs root and unshare")
    if words:
        without_locks(monkeypatch)
    process = writer(
        tmp_path, *words, prefix=("unshare", "--fork", "--pid", "--mount-proc", "--kill-child")
    )
    partial, _ = contents(tmp_path)
    assert not partial.startswith(f".step-1.partial-{process.pid}-")
    # Nor does a process here that happens to have its number.
    assert remove_partials(tmp_path) == []
    end(process)
    deadline = time.monotonic() + 20
    while not words and remove_partials(tmp_path) != [tmp_path / partial]:
        assert time.monotonic() < deadline, "a lock is released with its process"
        time.sleep(0.05)
    assert remove_partials(tmp_path) == []  # without locks, for a day
    assert contents(tmp_path) == ([partial, f"{partial}/half"] if words else [])


@pytest.mark.parametrize("locks", [True, False])
def test_what_another_host_or_boot_left_is_removed_a_day_after_its_last_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    if not locks:
        without_locks(monkeypatch)
    for process in (dead_process_id(), os.getpid(), os.getppid()):
        partial = left_behind(tmp_path, name(process, boot="0" * 8), hours=23)
        assert remove_partials(tmp_path) == []
        (partial / "more").touch()
        for path in (partial, partial / "half"):
            os.utime(path, (time.time() - 100 * 3600,) * 2)
        assert remove_partials(tmp_path) == []
        shutil.rmtree(partial)
        partial = left_behind(tmp_path, name(process, boot="0" * 8), hours=25)
        assert remove_partials(tmp_path) == [partial]


def test_another_container_without_locks_is_given_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch)
    left_behind(tmp_path, name(dead_process_id(), namespace="1"), hours=23)
    assert remove_partials(tmp_path) == []
    shutil.rmtree(tmp_path / contents(tmp_path)[0])
    partial = left_behind(tmp_path, name(os.getppid(), namespace="1"), hours=25)
    assert remove_partials(tmp_path) == [partial]


def test_a_process_number_that_is_in_use_again_keeps_nothing_where_there_are_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = left_behind(tmp_path, name(os.getppid()))
    with monkeypatch.context() as patch:
        without_locks(patch)
        assert remove_partials(tmp_path) == []
    assert remove_partials(tmp_path) == [partial]


@pytest.mark.parametrize("locks", [True, False])
def test_a_process_keeps_what_it_writes_and_removes_what_its_number_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    if not locks:
        without_locks(monkeypatch)
    left = left_behind(tmp_path, name(os.getpid()))
    with atomic_directory(tmp_path / "step-1") as folder:
        (folder / "fresh").touch()
        assert remove_partials(tmp_path) == [left]
    assert contents(tmp_path) == ["step-1", "step-1/fresh"]


def test_a_file_that_is_written_is_locked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed, fsync = [], os.fsync

    def cleaned_meanwhile(handle: int) -> None:
        removed.append(remove_partials(tmp_path))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", cleaned_meanwhile)
    atomic_write(tmp_path / "a", b"x")
    assert removed == [[], []] and contents(tmp_path) == ["a"]


def test_a_partial_that_is_cleaned_away_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a process that looked between its creation and its lock."""
    lock, removed = partials.lock, []

    def late(path: Path) -> int | None:
        if not removed:
            monkeypatch.setattr(partials, "lock", lock)
            removed.append(remove_partials(tmp_path))
        return lock(path)

    monkeypatch.setattr(partials, "lock", late)
    with atomic_directory(tmp_path / "step-1") as folder:
        (folder / "x").touch()
    assert len(removed[0]) == 1 and contents(tmp_path) == ["step-1", "step-1/x"]


def test_discarding_is_locked_and_a_kill_within_leaves_a_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_behind(tmp_path, "step-1")
    with monkeypatch.context() as patch:
        patch.setattr(partials, "_delete", lambda path: seen.append(remove_partials(tmp_path)))
        seen: list[list[Path]] = []
        discard(tmp_path / "step-1")
    partial, _ = contents(tmp_path)
    assert seen == [[]] and partial.startswith(f".step-1.partial-{os.getpid()}-")
    assert remove_partials(tmp_path) == [tmp_path / partial]
    assert contents(tmp_path) == []


def test_discarding_a_link_leaves_its_target(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").touch()
    (tmp_path / "step-1").symlink_to("data")
    discard(tmp_path / "step-1")
    assert contents(tmp_path) == ["data", "data/precious"]


def test_names_that_are_not_ours_to_the_end_are_left(tmp_path: Path) -> None:
    dead = dead_process_id()
    kept = [
        f".step-1.partial-{dead}",
        f".a.partial-{2**80}",
        ".c.partial-note",
        f"d.partial-{dead}",
        f"{name(dead)}.mp4",
        "step-1",
    ]
    for other in kept:
        (tmp_path / other).touch()
    assert remove_partials(tmp_path) == []
    assert contents(tmp_path) == sorted(kept)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_another_user_owns_is_left_to_that_user(tmp_path: Path) -> None:
    partial = left_behind(tmp_path, name(dead_process_id()))
    os.chown(partial, 12345, 12345)
    assert remove_partials(tmp_path) == []
    os.chown(partial, 0, 0)
    assert remove_partials(tmp_path) == [partial]


def test_what_cannot_be_removed_is_reported_and_the_others_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (
        left_behind(tmp_path, name(dead_process_id()).replace("step-1", word)) for word in "ab"
    )
    delete = partials._delete

    def busy(path: Path) -> None:
        if path == first:
            raise OSError(16, "Device or resource busy", ".nfs0001")
        delete(path)

    monkeypatch.setattr(partials, "_delete", busy)
    refused: list[OSError] = []
    assert remove_partials(tmp_path, refused.append) == [second]
    assert [error.filename for error in refused] == [str(first)]
    assert first.is_dir()


def test_a_file_is_not_made_where_a_link_was_planted(tmp_path: Path) -> None:
    victim, planted = tmp_path / "victim", tmp_path / "planted"
    planted.symlink_to(victim)
    with pytest.raises(FileExistsError):
        partials.create_file(planted)
    victim.write_text("precious")
    with pytest.raises(FileExistsError):
        partials.create_file(planted)
    assert victim.read_text() == "precious"


def test_a_killed_process_leaves_one_partial_that_two_cleaners_remove_once(tmp_path: Path) -> None:
    process = writer(tmp_path)
    process.send_signal(signal.SIGKILL)
    end(process)
    code = "import sys; from tinyllama.system.partials import remove_partials as r;"
    code += "print(len(r(sys.argv[1])))"
    words = [sys.executable, "-c", code, str(tmp_path)]
    cleaners = [
        subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert sum(int(cleaner.communicate()[0]) for cleaner in cleaners) == 1
    assert contents(tmp_path) == []
