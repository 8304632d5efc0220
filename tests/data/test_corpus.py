"""Tokens on disk: made once, by any number of processes, whole or not at all, in bounded memory."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from data_helpers import LINE, documents, load, run_python, small_tokenizer, write

from tinyllama.data import corpus, files
from tinyllama.data.corpus import prepare
from tinyllama.errors import DataError
from tinyllama.system.files import pieces_digest
from tinyllama.tokenizers.sentencepiece import train_tokenizer
from tinyllama.tokenizers.tokenizer import Tokenizer, write_files


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_tokens_do_not_depend_on_the_number_of_workers(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 200)
    write("a.txt", LINE * 60)
    write("b.jsonl", [f"{LINE} {number}" for number in range(60)])
    one = load(tokenizer, "a.txt", "b.jsonl")
    kept = one.tokens.tobytes()
    shutil.rmtree("cache")
    many = load(tokenizer, "a.txt", "b.jsonl", workers=3)
    assert many.tokens.tobytes() == kept
    assert many.path == one.path
    assert (many.n_documents, many.text_bytes) == (one.n_documents, one.text_bytes)


def test_tokens_are_made_once_and_again_for_another_text_or_tokenizer(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    build = corpus._build
    monkeypatch.setattr(corpus, "_build", lambda *args: (made.append(args[0]), build(*args)))
    write("a.txt", LINE)
    first = load(tokenizer, "a.txt")
    assert load(tokenizer, "a.txt").path == first.path
    write("moved/b.txt", LINE)
    assert load(tokenizer, "moved/b.txt").path == first.path
    assert len(made) == 1
    other = train_tokenizer([LINE * 20], 290)
    assert load(other, "a.txt").path != first.path
    write("a.txt", LINE + "more")
    assert documents(load(tokenizer, "a.txt"), tokenizer) == [LINE + "more"]
    assert len(made) == 3


@pytest.mark.parametrize("settled_seconds", [files._SETTLED_SECONDS, -1.0])
def test_a_change_that_hides_its_date_is_seen(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, settled_seconds: float
) -> None:
    monkeypatch.setattr(files, "_SETTLED_SECONDS", settled_seconds)
    path = write("a.txt", "before")
    before = path.stat()
    assert documents(load(tokenizer, "a.txt"), tokenizer) == ["before"]
    if settled_seconds < 0:
        # As after two seconds: let the kernel's clock tick, which gives ctime its value.
        while write("tick", "").stat().st_ctime_ns <= before.st_ctime_ns:
            pass
    write("a.txt", "after!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert documents(load(tokenizer, "a.txt"), tokenizer) == ["after!"]


def test_a_file_left_alone_is_not_read_again(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a.txt", "text")
    load(tokenizer, "a.txt")
    assert not Path("cache/digests.json").exists(), "too young to be remembered"
    monkeypatch.setattr(files, "_SETTLED_SECONDS", -1.0)
    load(tokenizer, "a.txt")
    with monkeypatch.context() as patch:
        patch.setattr(files, "sha256_file", lambda path: pytest.fail(f"read {path}"))
        assert load(tokenizer, "a.txt").n_documents == 1
    Path("cache/digests.json").write_text("{damaged")
    assert load(tokenizer, "a.txt").n_documents == 1


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("damaged", ["tokens.bin", "meta.json"])
def test_damaged_tokens_are_made_again_and_it_is_said_in_one_line(
    tokenizer: Tokenizer, damaged: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("a.txt", LINE)
    folder = load(tokenizer, "a.txt").path
    whole = (folder / damaged).read_bytes()
    assert capsys.readouterr().err == ""
    (folder / damaged).write_bytes(whole[:-1])
    assert documents(load(tokenizer, "a.txt"), tokenizer) == [LINE]
    assert capsys.readouterr().err.endswith("; the text is tokenized again\n")
    for bit in range(0, 8 * len(whole), 11):
        flip(folder / damaged, bit)
        assert documents(load(tokenizer, "a.txt"), tokenizer) == [LINE]
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.endswith("; the text is tokenized again\n"), bit
    assert (folder / damaged).read_bytes() == whole


def planted(folder: Path, **changes: object) -> None:
    """The folder's meta.json with other values, and a sum that holds."""
    values = json.loads((folder / "meta.json").read_bytes()) | {"sum": ""} | changes
    values["sum"] = hashlib.blake2b(msgspec.json.encode(values), digest_size=32).hexdigest()
    (folder / "meta.json").write_bytes(msgspec.json.encode(values))


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "O"},
        {"dtype": "object"},
        {"dtype": "uint64"},
        {"dtype": "float16"},
        {"n_tokens": 1},
        {"n_tokens": -1},
        {"n_tokens": 10**30},
        {"n_documents": "1"},
        {"bos_id": 5000},
        {"eos_id": -1},
        {"digest": "0" * 64},
    ],
)
def test_a_planted_cache_is_harmless(tokenizer: Tokenizer, changes: dict[str, object]) -> None:
    write("a.txt", LINE)
    folder = load(tokenizer, "a.txt").path
    planted(folder, **changes)
    dataset = load(tokenizer, "a.txt")
    assert documents(dataset, tokenizer) == [LINE] and dataset.tokens.dtype == np.uint16


def test_a_planted_id_past_the_vocabulary_is_never_used(tokenizer: Tokenizer) -> None:
    write("a.txt", LINE)
    folder = load(tokenizer, "a.txt").path
    tokens = np.fromfile(folder / "tokens.bin", np.uint16)
    tokens[3] = tokenizer.vocab_size
    tokens.tofile(folder / "tokens.bin")
    planted(folder, digest=pieces_digest(folder / "tokens.bin"))
    assert documents(load(tokenizer, "a.txt"), tokenizer) == [LINE]


@pytest.mark.parametrize("name", ["", "tokens.bin", "meta.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "zeros"])
def test_no_link_pipe_or_device_is_taken_for_tokens(
    tokenizer: Tokenizer, name: str, kind: str
) -> None:
    write("a.txt", LINE)
    path = load(tokenizer, "a.txt").path / name
    path.rename("elsewhere")
    if kind == "link":
        path.symlink_to(Path("elsewhere").absolute())
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    assert documents(load(tokenizer, "a.txt"), tokenizer) == [LINE]
    assert Path("elsewhere").exists()


def test_a_damaged_file_of_digests_is_said_and_made_again(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "_SETTLED_SECONDS", -1.0)
    write("a.txt", LINE)
    folder = load(tokenizer, "a.txt").path
    file = Path("cache/digests.json")
    whole = file.read_bytes()
    for place, byte in enumerate(whole):
        if byte in b"0123456789":
            other = b"1" if byte == ord("0") else b"0"
            file.write_bytes(whole[:place] + other + whole[place + 1 :])
            assert load(tokenizer, "a.txt").path == folder
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and said.endswith("; the texts are read again\n")
            assert file.read_bytes() == whole
    for data in (b"[" * 10**6, b'{"files": {"a": [[], "0"]}, "sum": ""}', b"[]" * 10**6):
        file.write_bytes(data)
        assert load(tokenizer, "a.txt").path == folder
        assert len(capsys.readouterr().err) < 400
    file.unlink()
    os.mkfifo(file)
    assert load(tokenizer, "a.txt").path == folder
    victim = write("victim", "precious")
    file.unlink()
    file.symlink_to(victim.absolute())
    assert load(tokenizer, "a.txt").path == folder
    assert victim.read_text() == "precious" and file.read_bytes() == whole


def test_the_cache_is_closed_to_others(tokenizer: Tokenizer) -> None:
    write("a.txt", LINE)
    load(tokenizer, "a.txt")
    assert Path("cache").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("new", ["shorter", LINE.upper(), LINE + "longer"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, new: str
) -> None:
    path = write("a.txt", LINE)
    read_chunk = files.read_chunk
    monkeypatch.setattr(
        corpus, "read_chunk", lambda chunk: (path.write_text(new), read_chunk(chunk))[1]
    )
    with pytest.raises(DataError, match=r"a\.txt: the file was changed while it was being read"):
        load(tokenizer, "a.txt")
    assert not list(Path("cache").iterdir())


def test_what_another_run_has_made_meanwhile_is_taken(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a.txt", LINE)
    build = corpus._build
    monkeypatch.setattr(corpus, "_build", lambda *given: (build(*given), build(*given)))
    assert load(tokenizer, "a.txt").n_documents == 1


def test_a_cache_that_cannot_be_written_is_named(tokenizer: Tokenizer) -> None:
    write("a.txt", LINE)
    write("cache", "a file")
    with pytest.raises(DataError, match=r"^cache: cannot keep the tokens there: Not a folder"):
        load(tokenizer, "a.txt")


def test_a_kill_leaves_nothing_half_made(tokenizer: Tokenizer) -> None:
    write_files(tokenizer, ".")
    write("a.txt", LINE * 100)  # so young that its digest is not kept
    process = run_python("""
        import sys, time
        from tinyllama.data import corpus, files
        from tinyllama.tokenizers.opening import open_tokenizer
        files.CHUNK_BYTES = 1000
        seen, read_chunk = [], corpus.read_chunk
        def read_slowly(chunk):
            seen.append(chunk)
            if len(seen) == 3:
                print("in the middle", flush=True)
                time.sleep(60)
            return read_chunk(chunk)
        corpus.read_chunk = read_slowly
        corpus.prepare("a.txt", open_tokenizer("."), "cache", workers=1, progress=False)
    """)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the middle\n"
        process.kill()
    kept = {Path("cache/digests.json")}  # where the text is older than two seconds
    (partial,) = set(Path("cache").iterdir()) - kept
    assert partial.name.startswith(".")
    assert documents(load(tokenizer, "a.txt"), tokenizer) == [LINE * 100]
    (whole,) = set(Path("cache").iterdir()) - kept
    assert not whole.name.startswith(".")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks the Linux kernel")
def test_memory_does_not_grow_with_the_text(tokenizer: Tokenizer) -> None:
    line = "some words of text and code\n"
    write("small.txt", line * 40_000)
    write("large.txt", line * 300_000)
    write("large.jsonl", [line * 1000] * 150)
    write_files(tokenizer, ".")
    # Not ru_maxrss: a child inherits that of the process that started it.
    process = run_python("""
        from pathlib import Path
        from tinyllama.data import batches, files
        from tinyllama.tokenizers.opening import open_tokenizer
        files.CHUNK_BYTES = 1 << 16
        tokenizer = open_tokenizer(".")
        for name in ("small.txt", "large.txt", "large.jsonl"):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            batches.prepare(name, tokenizer, "cache", workers=1, progress=False)
            print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    """)
    small_kib, *large_kib = map(int, process.communicate()[0].split())
    growth_bytes = (max(large_kib) - small_kib) * 1024
    assert growth_bytes < Path("large.txt").stat().st_size / 3, (small_kib, large_kib)


def test_a_progress_bar_is_shown_where_it_is_wanted(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    write("a.txt", LINE)
    prepare("a.txt", tokenizer, "cache", progress=False)
    assert capsys.readouterr().err == ""
    shutil.rmtree("cache")
    prepare("a.txt", tokenizer, "cache")
    assert "Tokenizing: 100%" in capsys.readouterr().err
