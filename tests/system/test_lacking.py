"""A system without fcntl, resource, madvise, SIGHUP and sysconf, as Windows is: what can work
works, and one line says what does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs_helpers import config_file, environment, finished_run, names, numbers

from tinyllama.system import lacking, memory
from tinyllama.system.files import atomic_directory, held

# Before anything of ours is imported.
HIDE = """
import sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
import mmap, os, pathlib, signal
for name in [name for name in dir(mmap) if name.startswith("MADV_")]:
    delattr(mmap, name)
for name in ("SIGHUP", "SIGPIPE"):
    delattr(signal, name)
for name in ("sysconf", "sysconf_names", "sched_getaffinity"):
    delattr(os, name)
"""
NOTICE = (
    "this system has no file locks (nothing stops a second run in the same folder), no SIGHUP"
    " (a run whose terminal is closed does not save)"
)


def hidden(code: str, *words: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", HIDE + code, *map(str, words)],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


COMMAND = "from tinyllama.cli.app import program\nprogram(sys.argv[1:])\n"


def test_a_run_trains_saves_and_resumes_and_says_what_is_lacking(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", config_file(run), "--quiet", "--set", "checkpointing.save_every=4"]
    done = hidden(COMMAND, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(NOTICE) == 1 and "finished: step" in done.stdout
    whole = numbers(run)
    expected = numbers(finished_run())
    assert {s: line["loss"] for s, line in whole.items()} == {
        s: line["loss"] for s, line in expected.items()
    }
    (run / "final").rename(tmp_path / "moved")
    last = max(name for name in names(run))
    done = hidden(COMMAND, *words, "--resume", run / last)
    assert (done.returncode, done.stderr) == (0, "")
    assert numbers(run) == whole


def test_a_model_is_measured_and_writes_there(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("def first(second):\n    return second\n" * 20)
    model = finished_run() / "final"
    words = ["--model", model, "--data", tmp_path / "text.txt", "--cache-dir", tmp_path / "cache"]
    done = hidden(COMMAND, "evaluate", *words)
    assert done.returncode == 0 and json.loads(done.stdout)["loss"] > 0
    words = ["--model", model, "--prompt", "def ", "--max-new-tokens", "4"]
    done = hidden(COMMAND, "generate", *words)
    assert done.returncode == 0 and done.stdout.startswith("def ")


def test_text_is_tokenized_by_several_processes_there(tmp_path: Path) -> None:
    code = f"""
from tinyllama.config import load_config
from tinyllama.data.corpus import prepare
from tinyllama.tokenizers.opening import open_tokenizer
if __name__ == "__main__":
    config = load_config(sys.argv[1])
    tokenizer = open_tokenizer(config.data.tokenizer)
    for workers in (1, 2):
        cache = {str(tmp_path)!r} + f"/cache{{workers}}"
        print(prepare(config.data.train_path, tokenizer, cache, workers=workers).n_tokens)
"""
    (tmp_path / "script.py").write_text(HIDE + code)  # which spawned processes import too
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", config_file(tmp_path / "run")],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = map(int, done.stdout.split())
    assert one == two > 0


def test_folders_are_whole_or_absent_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyllama.system.partials.fcntl", None)
    with held(tmp_path), held(tmp_path), atomic_directory(tmp_path / "a") as folder:
        (folder / "x").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "a"]


def test_nothing_is_printed_where_nothing_is_lacking() -> None:
    if sys.platform != "linux":
        pytest.skip("Linux has everything")
    assert lacking.notice() is None


def test_a_system_that_measures_no_memory_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    assert lacking.notice() is None and memory.resident_bytes() > 1 << 20  # resource measures it
    monkeypatch.setattr(memory, "resource", None)
    assert memory.resident_bytes() == memory.resident_bytes(peak=True) == 0
    assert lacking.notice() == (
        "this system has no measure of a process's memory (memory_bytes is 0)"
    )
