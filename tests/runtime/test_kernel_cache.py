"""The cache of compiled kernels: what it believes, what it keeps, and that nothing else is read."""

import os
import pickle
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs_helpers import ROOT, config_file, environment, run_command

from tinyllama.runtime import kernel_cache
from tinyllama.runtime.cpu import cpu_device

KEY, OTHER = kernel_cache.digest("a"), kernel_cache.digest("b")
# A sum on the CPU, made by a process of its own.
COMPUTE = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
from tinyllama.system import device
device.select()
from tinyllama.runtime.patches import install
install()
from tinygrad import Tensor
print((Tensor([3.0, 4.0]).contiguous().realize() * 5).sum().item())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A new cache for this process."""
    monkeypatch.setenv("TINYLLAMA_KERNEL_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setattr(kernel_cache, "_room_bytes", None)
    kernel_cache._folder.cache_clear()
    yield tmp_path / "kernels"
    kernel_cache._folder.cache_clear()


def compute(folder: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", COMPUTE],
        capture_output=True,
        text=True,
        env=environment(TINYLLAMA_KERNEL_CACHE=str(folder), **variables),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_kernel_that_was_kept_is_there_again(folder: Path) -> None:
    assert kernel_cache.get(KEY) is None
    kernel_cache.put(KEY, b"kernel")
    assert kernel_cache.get(KEY) == b"kernel"
    assert kernel_cache.get(OTHER) is None
    assert (folder.stat().st_mode & 0o777, (folder / KEY).stat().st_mode & 0o777) == (0o700, 0o600)


def test_parts_of_a_key_do_not_run_together() -> None:
    assert kernel_cache.digest("ab", "c") != kernel_cache.digest("a", "bc")


def test_every_flipped_bit_of_an_entry_is_found_and_the_entry_removed(folder: Path) -> None:
    kernel_cache.put(KEY, b"kernel")
    whole = (folder / KEY).read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / KEY).write_bytes(damaged)
        assert kernel_cache.get(KEY) is None
        assert not (folder / KEY).exists()


def test_an_entry_that_is_cut_or_of_another_key_is_not_taken(folder: Path) -> None:
    kernel_cache.put(KEY, b"kernel")
    whole = (folder / KEY).read_bytes()
    (folder / OTHER).write_bytes(whole)
    assert kernel_cache.get(OTHER) is None
    for length in range(len(whole)):
        (folder / KEY).write_bytes(whole[:length])
        assert kernel_cache.get(KEY) is None


def test_links_pipes_and_huge_files_are_not_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_cache.put(KEY, b"kernel")
    (folder / KEY).rename(tmp_path / "elsewhere")
    (folder / KEY).symlink_to(tmp_path / "elsewhere")
    assert kernel_cache.get(KEY) is None
    os.mkfifo(folder / KEY)
    assert kernel_cache.get(KEY) is None
    (folder / KEY / "inner").mkdir(parents=True)
    assert kernel_cache.get(KEY) is None
    kernel_cache.put(KEY, b"kernel")
    assert kernel_cache.get(KEY) == b"kernel"
    monkeypatch.setattr(kernel_cache, "MOST_ENTRY_BYTES", 8)
    assert kernel_cache.get(KEY) is None


def test_a_folder_that_others_may_write_to_is_not_used(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    kernel_cache.put(KEY, b"kernel")
    assert list(folder.iterdir()) == []
    assert "Other users may write to it" in (kernel_cache.problem() or "")


def test_a_command_says_once_that_kernels_are_not_kept(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir()
    folder.chmod(0o777)
    words = ["train", config_file(tmp_path / "run"), "--quiet"]
    code, _, errors = run_command(*words, TINYLLAMA_KERNEL_CACHE=str(folder))
    assert code == 0
    said = [line for line in errors.splitlines() if "not kept" in line]
    assert said == [
        "compiled kernels are not kept, so each start compiles them again: "
        f"{folder}: Other users may write to it: `chmod go-w` it once you trust what it holds"
        "; TINYLLAMA_KERNEL_CACHE=DIR names another folder"
    ]


def test_where_no_folder_can_be_made_the_notice_names_the_variable(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("TINYLLAMA_KERNEL_CACHE", str(tmp_path / "home" / "kernels"))
    assert (kernel_cache.problem() or "").endswith(
        "; TINYLLAMA_KERNEL_CACHE=DIR names another folder"
    )


def test_a_folder_that_is_a_link_is_not_used(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "planted").mkdir()
    folder.symlink_to(tmp_path / "planted")
    kernel_cache.put(KEY, b"kernel")
    assert list((tmp_path / "planted").iterdir()) == []


def test_what_was_not_used_for_longest_is_removed_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_cache, "MOST_BYTES", 10_000)
    keys = [kernel_cache.digest(str(number)) for number in range(9)]
    for number, key in enumerate(keys):
        kernel_cache.put(key, bytes(1000))
        os.utime(folder / key, (number, number))
    assert kernel_cache.get(keys[0]) == bytes(1000)  # used just now
    kernel_cache.put(KEY, bytes(2000))
    held = sum(path.stat().st_size for path in folder.iterdir())
    assert held <= 10_000
    left = [key for key in keys if (folder / key).exists()]
    assert keys[0] in left and keys[8] in left and keys[1] not in left
    assert kernel_cache.get(KEY) == bytes(2000)


def test_half_written_entries_of_killed_processes_are_removed(folder: Path) -> None:
    kernel_cache.put(KEY, b"kernel")
    for name, age in ((".new-old", 1), (".new-now", None)):
        (folder / name).write_bytes(b"half")
        if age is not None:
            os.utime(folder / name, (age, age))
    kernel_cache._room_bytes = None
    kernel_cache.put(OTHER, b"kernel")
    assert {path.name for path in folder.iterdir()} == {KEY, OTHER, ".new-now"}


def test_a_full_disk_leaves_no_half_and_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kernel_cache.os, "replace", full)
    kernel_cache.put(KEY, b"kernel")
    assert list(folder.iterdir()) == []


def test_the_key_depends_on_source_compiler_flags_and_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler = cpu_device().compiler

    def key(source: str) -> str:
        kernel_cache._identity.cache_clear()
        return kernel_cache.key_of(compiler, source)

    keys = {key("x"), key("y")}
    with monkeypatch.context() as patch:
        patch.setattr(kernel_cache.device, "compiler_identity", lambda: "another clang")
        keys.add(key("x"))
        patch.setattr(kernel_cache.processor, "processor_name", lambda: "another processor")
        keys.add(key("x"))
        patch.setattr(compiler, "cachekey", "other flags")
        keys.add(key("x"))
    assert key("x") in keys  # and the identity is the right one again
    assert len(keys) == 5


class Planted:
    """A pickle that makes a folder when it is read."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.victim),)


def test_tinygrads_database_is_never_opened(tmp_path: Path) -> None:
    database, victim, kernels = tmp_path / "cache.db", tmp_path / "victim", tmp_path / "kernels"
    tinygrads = COMPUTE.replace("install()\n", "")
    command = [sys.executable, "-c", tinygrads]
    own = environment(CACHEDB=str(database))
    subprocess.run(command, env=own, check=True)  # tinygrad's own rows, so that its keys are found
    with sqlite3.connect(database) as connection:
        (table,) = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        connection.execute(f"UPDATE '{table[0]}' SET val = ?", (pickle.dumps(Planted(victim)),))
    connection.close()
    assert compute(kernels, CACHEDB=str(database)) == "35.0"
    assert not victim.exists()
    subprocess.run(command, env=own, capture_output=True)
    assert victim.exists()  # so without the patch it would have been run
    database.write_bytes(b"not a database")
    assert compute(tmp_path / "more", CACHEDB=str(database)) == "35.0"
    assert database.read_bytes() == b"not a database"


def test_damaged_kernels_are_compiled_again(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    assert compute(folder) == "35.0"
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    assert whole
    for path, data in whole.items():
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert compute(folder) == "35.0"
    assert {path: path.read_bytes() for path in folder.iterdir()} == whole
