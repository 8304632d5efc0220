"""Folders that are wrong on purpose: one short line, under a second, under 200 MB, whatever they
say. And any few bytes of a folder changed: a message of ours or the model, nothing else."""

import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_helpers import write_base
from model_helpers import SQUARE

from tinyllama.errors import TinyllamaError
from tinyllama.formats.huggingface import INDEX, WEIGHTS, llama_shapes
from tinyllama.formats.models import open_model
from tinyllama.formats.peft import AdapterFolder
from tinyllama.system.memory import resident_bytes

ROOT = Path(__file__).resolve().parents[2]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
GENERATION = "generation_config.json"
# Whatever a value may become in JSON.
PIECES = [b"9", b"-", b"0", b'"', b"[", b"]", b"{", b"}", b",", b"e", b"\xff", b"", b"null", b"NaN"]
PIECES += [b"999999999999", b"1e999", b"[[[]]]"]
ESCAPE = "\x1b[2J\x9b31m\u202e"


def header(folder, change):
    """Rewrite the header of a folder's weights by `change(entries)`, which may return bytes."""
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    text = change(entries)
    text = json.dumps(entries).encode() if text is None else text
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def other_kind(name, make):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def edit_entry(**changes):
    def change(entries):
        entries["model.norm.weight"] |= changes

    return lambda folder: header(folder, change)


def renamed(name):
    def change(entries):
        entries[name] = entries.pop("model.norm.weight")

    return lambda folder: header(folder, change)


def many_names(entries):
    """16 million bytes of names, each once or the first one again at the end."""
    return b"{" + b",".join(b'"%d":{}' % i for i in range(400_000)) + b',"0":{}}'


def index(**weight_map):
    def change(folder):
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return change


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)


BAD = {
    "truncated": lambda f: os.truncate(f / WEIGHTS, 5000),
    "empty": write(WEIGHTS, b""),
    "pickle": write(WEIGHTS, b"\x80\x02}q\x00."),
    "zip": write(WEIGHTS, b"PK\x03\x04" + bytes(50)),
    "git lfs": write(WEIGHTS, LFS),
    "git lfs config": write("config.json", LFS),
    "html": write(WEIGHTS, b"<!DOCTYPE html><html>not found</html>"),
    "html config": write("config.json", b"\n <html></html>"),
    "gguf": write(WEIGHTS, b"GGUF" + bytes(90)),
    "a header of 2^63": write(WEIGHTS, b"\xff" * 7 + b"\x7f" + bytes(90)),
    "2^60 values": edit_entry(shape=[1 << 60]),
    "2^60 twice": edit_entry(shape=[1 << 60, 1 << 60]),
    "sizes without end": edit_entry(shape=[(1 << 63) - 1] * 64),
    "120,000 sizes": edit_entry(shape=[3] * 120_000),
    "overlap": edit_entry(data_offsets=[0, 128]),
    "offsets beyond": edit_entry(data_offsets=[1 << 60, (1 << 60) + 128]),
    "a shape of text": edit_entry(shape="many"),
    "a type of text": edit_entry(dtype=ESCAPE * 1000),
    "many names": lambda f: header(f, many_names),
    "a name twice": lambda f: header(
        f, lambda entries: json.dumps(entries).replace("model.norm", "lm_head").encode()
    ),
    "a million lists": lambda f: header(f, lambda e: b'{"a":[' + b"[]," * 1_300_000 + b"[]]}"),
    "a million objects": lambda f: header(f, lambda e: b'{"a":[' + b"{}," * 1_300_000 + b"{}]}"),
    "a long number": lambda f: header(f, lambda e: b'{"a":' + b"9" * 3_000_000 + b"}"),
    "deep": lambda f: header(f, lambda e: b"[" * 3_000_000),
    "escapes in a name": renamed(ESCAPE),
    "a long name": renamed("x" * 1_000_000),
    "45 MB of lists": write("config.json", b"[" + b"[]," * 15_000_000 + b"[]]"),
    "a deep config": write("config.json", b'{"a":' * 100_000),
    "no config": lambda f: (f / "config.json").unlink(),
    "a list for a config": write("config.json", b"[]"),
    "a thousand million layers": lambda f: config(f, num_hidden_layers=10**9),
    "a million layers": lambda f: config(f, num_hidden_layers=10**6),
    "10^30 layers": lambda f: config(f, num_hidden_layers=10**30),
    "minus one layer": lambda f: config(f, num_hidden_layers=-1),
    "layers of text": lambda f: config(f, num_hidden_layers=ESCAPE * 99),
    "layers of NaN": lambda f: config(f, num_hidden_layers=float("nan")),
    "2^60 hidden": lambda f: config(f, hidden_size=1 << 60),
    "2^4000 rows": lambda f: config(f, vocab_size=1 << 4000),
    "a model type of text": lambda f: config(f, model_type=ESCAPE * 9999),
    "a scaling of lists": lambda f: config(f, rope_scaling=[[[]]] * 9999),
    "a scaling with escapes": lambda f: config(f, rope_scaling={"type": ESCAPE, ESCAPE: 1}),
    "an infinite factor": lambda f: config(
        f, rope_scaling={"type": "linear", "factor": float("inf")}, rope_parameters=None
    ),
    "quantized": lambda f: config(f, quantization_config={"a": ["x" * 999_000]}),
    "end ids of text": write(GENERATION, b'{"eos_token_id": "' + b"x" * 99999 + b'"}'),
    "a million end ids": write(GENERATION, b'{"eos_token_id": [' + b"{}," * 300_000 + b"1]}"),
    "a FIFO": other_kind(WEIGHTS, os.mkfifo),
    "a FIFO for a config": other_kind("config.json", os.mkfifo),
    "a FIFO for end ids": other_kind("generation_config.json", os.mkfifo),
    "/dev/zero": other_kind(WEIGHTS, lambda p: p.symlink_to("/dev/zero")),
    "/dev/zero for a config": other_kind("config.json", lambda p: p.symlink_to("/dev/zero")),
    "a folder for a config": other_kind("config.json", os.mkdir),
    "a terabyte of nothing": lambda f: sparse(f / WEIGHTS),
    "a terabyte for a config": lambda f: sparse(f / "config.json"),
    "a link to itself": other_kind(WEIGHTS, lambda p: p.symlink_to(p)),
    "an index that climbs": index(a="../../../etc/passwd"),
    "an absolute index": index(a="/etc/passwd"),
    "an index of numbers": index(a=3),
    "an index of nothing": index(a="none.safetensors"),
    "an index with escapes": index(**{ESCAPE: f"{ESCAPE}.safetensors"}),
    "an index of others": index(**{f"x{i}": "a.safetensors" for i in range(9999)}),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("good") / "model", SQUARE)


def copied(good, folder):
    folder.mkdir()
    for path in good.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_in_short_lines_in_under_a_second(case, good, tmp_path):
    folder = copied(good, tmp_path / "bad")
    BAD[case](folder)
    start = time.perf_counter()
    with pytest.raises(TinyllamaError) as caught:
        open_model(folder)
    seconds = time.perf_counter() - start
    lines = str(caught.value).split("\n")
    assert len(lines) <= 21
    assert all(str(folder) in line and len(line) < 400 + len(str(folder)) for line in lines)
    assert all(line.isprintable() for line in lines)
    assert seconds < 1, f"{seconds:.2f} s"


MEMORY = """
import sys
from tinyllama.errors import TinyllamaError
from tinyllama.formats.models import open_model
def peak():  # unlike ru_maxrss, not that of the process which started this one
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
for folder in sys.argv[1:]:
    try:
        open_model(folder)
        raise SystemExit(f"{folder} was opened")
    except TinyllamaError:
        print(folder, peak() // 1000, file=sys.stderr)
print(peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_none_of_them_takes_200_mb(good, tmp_path):
    """The peak of one process that opens all of them, its libraries included."""
    folders = []
    for number, change in enumerate(BAD.values()):
        folders.append(copied(good, tmp_path / str(number)))
        change(folders[-1])
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, folders)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 200e6, done.stderr


def test_what_people_have_by_mistake_is_called_by_its_name(good, tmp_path):
    for case, words in (
        ("git lfs", f"{WEIGHTS}: is a Git LFS pointer, not the file itself: type git lfs pull"),
        ("git lfs config", "config.json: is a Git LFS pointer"),
        ("html", f"{WEIGHTS}: is a page of HTML, not the file itself"),
        ("pickle", f"{WEIGHTS}: is a pickle, which can run code and is never read"),
        ("gguf", f"{WEIGHTS}: is a GGUF file: name it with its ending .gguf"),
        ("a FIFO", f"{WEIGHTS}: is no regular file"),
        ("a thousand million layers", "num_hidden_layers: got 1000000000, but the files hold"),
        ("an index that climbs", "weight_map: must map names to files of this folder"),
    ):
        folder = copied(good, tmp_path / case)
        BAD[case](folder)
        with pytest.raises(TinyllamaError, match=re.escape(words)):
            open_model(folder)


def test_27_gb_are_opened_and_read_in_part_without_their_memory(tmp_path):
    """A sparse file with the header of Llama 2 7B in float32."""
    sizes = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32}
    sizes |= {"num_attention_heads": 32, "intermediate_size": 11008, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    from tinyllama.config import LlamaConfig
    from tinyllama.formats.safetensors import build_header

    tensors = sorted(llama_shapes(LlamaConfig.llama2_7b()).items())
    with open(tmp_path / WEIGHTS, "wb") as file:
        text = build_header(((name, "F32", shape) for name, shape in tensors), {"format": "pt"})
        file.write(text)
        file.truncate(len(text) + 4 * 6_738_415_616)
    before = resident_bytes(peak=True)
    start = time.perf_counter()
    opened = open_model(tmp_path)
    assert float(opened.float32("model.layers.31.mlp.down_proj.weight")[5, 7]) == 0
    assert time.perf_counter() - start < 1
    assert resident_bytes(peak=True) - before < 30e6


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_few_bytes_changed_give_the_model_or_a_message_of_ours(good, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        copied(good, folder)
    name = data.draw(st.sampled_from(["config.json", GENERATION, WEIGHTS]))
    content = bytearray((good / name).read_bytes())
    length = len(content)
    if name == WEIGHTS:  # its header
        length = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, length - 1))
        new = data.draw(st.sampled_from(PIECES))
        content[place : place + (len(new) or 1)] = new
    (folder / name).write_bytes(content)
    try:
        open_model(folder)
    except TinyllamaError as error:
        lines = str(error).split("\n")
        assert len(lines) <= 21 and all(len(line) < 600 and line.isprintable() for line in lines)
    finally:
        (folder / name).write_bytes((good / name).read_bytes())


def test_the_folder_that_all_of_these_are_made_from_is_good(good):
    assert np.isfinite(open_model(good).float32("model.norm.weight")).all()
    with pytest.raises(TinyllamaError, match="missing"):
        AdapterFolder(good)
