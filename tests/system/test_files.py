"""Files and folders are whole or absent: after a crash, an error or a second writer."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllama.system import partials
from tinyllama.system.files import (
    atomic_directory,
    atomic_write,
    held,
    make_folder,
    naming_file,
    private_folder,
    read_file,
    remove_partials,
    sha256_file,
)


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_sha256_is_that_of_the_bytes_across_read_blocks(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000  # 2.4 MiB: more than two read blocks
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_sha256_of_an_empty_file_is_the_published_constant(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    assert sha256_file(tmp_path / "x").startswith("e3b0c44298fc1c149afbf4c8996fb924")


def test_write_makes_a_file_and_replaces_one(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    atomic_write(target, b"first, and longer")
    atomic_write(target, b"second")
    assert target.read_bytes() == b"second"
    assert contents(tmp_path) == ["a.json"]


def test_write_keeps_the_permissions_of_the_file_it_replaces(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.touch()
    target.chmod(0o640)
    atomic_write(target, b"x")
    assert target.stat().st_mode & 0o777 == 0o640


def test_write_goes_through_a_link_and_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to("real/file")
    atomic_write(link, b"x")
    assert link.is_symlink()
    assert (tmp_path / "real" / "file").read_bytes() == b"x"


def test_write_that_fails_leaves_the_old_bytes_and_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        atomic_write(target, b"new")
    assert target.read_bytes() == b"old"
    assert contents(tmp_path) == ["a"]


def test_data_is_on_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def recorded_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        size = f" of {path.stat().st_size} bytes" if path.is_file() else ""
        name = re.sub(rf"partial-{os.getpid()}-[-0-9a-f]+$", "partial-PID", path.name)
        events.append(f"fsync {name}{size}")
        fsync(descriptor)

    def recorded_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    def recorded_replace(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    monkeypatch.setattr(os, "replace", recorded_replace)
    atomic_write(tmp_path / "f", b"x")
    assert events == ["fsync .f.partial-PID of 1 bytes", "rename", f"fsync {tmp_path.name}"]

    events.clear()
    with atomic_directory(tmp_path / "d") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "leaf").touch()
    assert events == [
        "fsync leaf of 0 bytes",
        "fsync inner",
        "fsync .d.partial-PID",
        "rename",
        f"fsync {tmp_path.name}",
    ]


def test_directory_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    final = tmp_path / "new" / "er" / "step-1"
    with atomic_directory(final) as folder:
        (folder / "weights").write_bytes(b"w")
        assert not final.exists()
        assert folder.parent == final.parent  # the same file system, so that renaming is atomic
    assert contents(final.parent) == ["step-1", "step-1/weights"]


def test_directory_of_a_failed_block_is_removed_and_its_error_passes_on(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="lost the GPU"):
        with atomic_directory(tmp_path / "step-1") as folder:
            (folder / "weights").write_bytes(b"w")
            raise RuntimeError("lost the GPU")
    assert contents(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_directory_refuses_a_name_that_is_taken(tmp_path: Path, kind: str) -> None:
    final = tmp_path / "step-1"
    if kind == "file":
        final.touch()
    elif kind == "folder":
        final.mkdir()
    else:
        final.symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="step-1"), atomic_directory(final):
        pytest.fail("the block must not run")
    assert contents(tmp_path) == ["step-1"]


def test_directory_does_not_replace_one_that_appeared_meanwhile(tmp_path: Path) -> None:
    final = tmp_path / "step-1"
    with pytest.raises(FileExistsError, match="step-1"), atomic_directory(final) as folder:
        (folder / "mine").touch()
        final.mkdir()
    assert contents(tmp_path) == ["step-1"]


def test_a_killed_save_leaves_no_final_folder_and_its_partial_is_removed(tmp_path: Path) -> None:
    script = (
        "import os, sys; from tinyllama.system.files import atomic_directory\n"
        "with atomic_directory(sys.argv[1]) as folder:\n"
        "    (folder / 'half').touch(); os._exit(9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, tmp_path / "step-1"], check=False)
    assert ended.returncode == 9
    assert not (tmp_path / "step-1").exists()
    assert len(remove_partials(tmp_path)) == 1
    assert contents(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device here")
def test_a_full_disk_names_the_file_that_is_written(tmp_path):
    file = tmp_path / "file"
    with pytest.raises(OSError, match="No space left on device: ") as failed, naming_file(file):
        Path("/dev/full").write_bytes(b"x")
    assert failed.value.filename == str(file)
    with pytest.raises(FileNotFoundError) as missing, naming_file(file):
        open("nowhere")
    assert missing.value.filename == "nowhere"


def test_write_that_follows_no_link_replaces_it(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "digests.json").symlink_to(victim)
    atomic_write(tmp_path / "digests.json", b"ours", links=False)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "digests.json").is_symlink()
    assert (tmp_path / "digests.json").read_text() == "ours"


def test_a_partial_name_that_was_planted_is_not_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    names = iter([tmp_path / ".a.partial-foreseen"])
    names_of = partials._new_name
    monkeypatch.setattr(partials, "_new_name", lambda final: next(names, None) or names_of(final))
    (tmp_path / ".a.partial-foreseen").symlink_to(victim)
    with pytest.raises(FileExistsError):
        atomic_write(tmp_path / "a", b"new")
    assert victim.read_text() == "precious" and not (tmp_path / "a").exists()


@pytest.mark.parametrize("planted", ["link", "dangling link", "pipe"])
def test_a_lock_that_was_planted_is_refused(tmp_path: Path, planted: str) -> None:
    lock, victim = tmp_path / "run" / ".lock", tmp_path / "victim"
    lock.parent.mkdir()
    if planted == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(victim)
    if planted == "link":
        victim.write_text("precious")
    with pytest.raises(OSError) as refused, held(lock.parent):
        pytest.fail("the block must not run")
    assert refused.value.filename == str(lock)
    assert victim.exists() == (planted == "link")


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    assert read_file(tmp_path / "file", 5) == read_file(tmp_path / "link", 5) == b"12345"
    for path, words in (
        (tmp_path / "file", "Has 5 bytes, at most 4 are read"),
        (tmp_path / "pipe", "Is not a regular file"),
        (Path("/dev/zero"), "Is not a regular file"),
    ):
        with pytest.raises(OSError, match=words) as refused:
            read_file(path, 4)
        assert refused.value.filename == str(path)
    with pytest.raises(OSError):
        read_file(tmp_path / "link", 5, links=False)
    with pytest.raises(OSError):
        read_file(tmp_path, 5)


def test_a_private_folder_is_closed_to_others(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    private_folder(folder)
    private_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o720)
    with pytest.raises(PermissionError, match="Other users may write"):
        private_folder(folder)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(NotADirectoryError):
        private_folder(tmp_path / "link")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_private_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.chown(tmp_path / "a", 12345, 12345)
    with pytest.raises(PermissionError, match="Belongs to another user"):
        private_folder(tmp_path / "a")


def test_the_names_of_new_folders_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = [], os.fsync

    def recorded(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    make_folder(tmp_path / "a" / "b" / "c")
    assert synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    make_folder(tmp_path / "a" / "b")
    assert len(synced) == 3
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        make_folder(tmp_path / "file")
