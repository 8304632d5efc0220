"""Digests of large files: taken once a day, and again whenever a file may be another one."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinyllama.system import checked
from tinyllama.system.files import sha256_file


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checked, "SMALL_BYTES", 4)
    monkeypatch.setattr(checked, "_SETTLED_SECONDS", -1.0)
    yield


class Reader:
    """Takes digests, and counts how often."""

    def __init__(self, *paths: Path) -> None:
        self.paths, self.reads = paths, 0

    def digest(self, kind: str = "sha256") -> str:
        def take() -> str:
            self.reads += 1
            return " ".join(map(sha256_file, self.paths))

        return checked.digest(kind, self.paths, take)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(b"a" * 100)
    return tmp_path / "weights"


def test_a_file_that_was_left_alone_is_read_once(file: Path) -> None:
    reader = Reader(file)
    assert reader.digest() == reader.digest() == sha256_file(file)
    assert reader.reads == 1
    reader.digest("another kind")
    assert reader.reads == 2


def test_small_files_are_always_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked, "SMALL_BYTES", 101)
    reader = Reader(file)
    reader.digest(), reader.digest()
    assert reader.reads == 2


def test_a_change_that_hides_its_date_is_seen(file: Path) -> None:
    reader, before = Reader(file), file.stat()
    reader.digest()
    time.sleep(0.02)
    file.write_bytes(b"b" * 100)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert reader.digest() == sha256_file(file)
    file.rename(file.with_name("other"))
    file.write_bytes(b"c" * 100)
    assert reader.digest() == sha256_file(file) and reader.reads == 3


def test_one_of_several_files_is_enough(file: Path, tmp_path: Path) -> None:
    (tmp_path / "more").write_bytes(b"b" * 9)
    reader = Reader(file, tmp_path / "more")
    reader.digest(), reader.digest()
    assert reader.reads == 1
    (tmp_path / "more").write_bytes(b"c" * 9)
    reader.digest()
    assert reader.reads == 2


def test_a_day_later_it_is_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, now = Reader(file), time.time()
    reader.digest()
    for later, reads in ((23 * 3600, 1), (25 * 3600, 2), (-3600, 3)):
        monkeypatch.setattr(checked.time, "time", lambda later=later: now + later)
        reader.digest()
        assert reader.reads == reads, later


def test_a_file_that_was_just_written_is_not_remembered(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked, "_SETTLED_SECONDS", 2.0)
    reader = Reader(file)
    reader.digest(), reader.digest()
    assert reader.reads == 2


def test_what_is_remembered_is_not_believed_where_it_is_damaged_or_open_to_others(
    file: Path, tmp_path: Path
) -> None:
    reader = Reader(file)
    reader.digest()
    memory = tmp_path / "cache" / "tinyllama" / "checked" / "checked.json"
    whole = memory.read_bytes()
    reads = 1
    for place in range(0, len(whole), 7):
        memory.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert reader.digest() == sha256_file(file)
        reads += 1
        assert reader.reads == reads, place
    memory.parent.chmod(0o722)
    reader.digest(), reader.digest()
    assert reader.reads == reads + 2


def test_no_more_than_so_many_are_kept(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked, "_MOST_ENTRIES", 3)
    reader = Reader(file)
    for number in range(5):
        reader.digest(str(number))
    assert [name.split("\n")[0] for name in checked._read()] == ["2", "3", "4"]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    reader = Reader(file)
    assert reader.digest() == reader.digest() == sha256_file(file)
    assert reader.reads == 2
