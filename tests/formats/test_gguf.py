"""The GGUF reader against the `gguf` library, and on files that lie."""

import os
import struct
import time

import numpy as np
import pytest
from gguf_helpers import CONFIG, gguf, random_blocks, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processor_time import within

from tinyllama.errors import TinyllamaError, WeightsError
from tinyllama.formats.gguf import MAX_STRINGS, GgufFile, open_gguf
from tinyllama.formats.gguf_blocks import BLOCK_TYPES, PACKED_TYPES, packed_rows, widen
from tinyllama.system.memory import resident_bytes

KINDS = ("F32", "F16", "BF16", *BLOCK_TYPES)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return path, write_gguf(path, "Q4_1", kinds={"model.embed_tokens.weight": "Q8_0"})


# ---- blocks


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_have_the_librarys_sizes_and_values(kind):
    number, block = gguf.GGMLQuantizationType[kind], BLOCK_TYPES[kind]
    assert block.number == number
    assert (block.values, block.memory.itemsize) == gguf.GGML_QUANT_SIZES[number]
    raw = random_blocks(kind, (24, 512), seed=1)
    raw[:4] = np.random.default_rng(2).integers(0, 256, raw[:4].shape)  # also scales of any bits
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, number)
    assert np.array_equal(widen(kind, raw), expected, equal_nan=True)


@pytest.mark.parametrize("kind", PACKED_TYPES)
def test_packed_rows_hold_the_same_numbers(kind):
    raw = random_blocks(kind, (6, 96), seed=3)
    packed, scales, minima = packed_rows(kind, raw)
    if kind == "Q8_0":
        assert packed.dtype == np.int8
        q = packed.astype(np.float32)
    else:
        pairs = np.stack([packed & 15, packed >> 4], axis=-1).reshape(6, 96).astype(np.int32)
        q = (pairs if kind == "Q4_1" else (pairs ^ 8) - 8).astype(np.float32)
    values = q.reshape(6, 3, 32) * scales.astype(np.float32)[..., None]
    assert (minima is not None) == (kind == "Q4_1")
    if minima is not None:
        values += minima.astype(np.float32)[..., None]
    assert np.array_equal(values.reshape(6, 96), widen(kind, raw))
    held = sum(part.nbytes for part in (packed, scales, minima) if part is not None)
    assert held == raw.nbytes


# ---- the file


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_gives_the_values_and_rows_of_hugging_face(tmp_path, kind):
    values = write_gguf(tmp_path / "model.gguf", kind)
    opened = open_gguf(tmp_path / "model.gguf")
    assert set(opened.names) == set(values)
    for name, value in values.items():
        assert np.array_equal(opened.float32(name), value), name
        assert opened.shape(name) == value.shape
    assert opened.stored_type(Q_PROJ) == kind
    assert opened.dtype(Q_PROJ) == (kind if kind in ("F32", "F16", "BF16") else "F32")


def test_configuration_tokens_and_metadata(model):
    opened = open_gguf(model[0])
    assert opened.config == CONFIG
    assert (opened.bos_id, opened.eos_ids) == (1, (2,))
    assert opened.metadata["tokenizer.ggml.tokens"][:2] == ["<0>", "<1>"]
    assert opened.metadata["tokenizer.ggml.token_type"].tolist() == [1] * CONFIG.vocab_size


def test_rows_are_those_of_the_whole_tensor_also_where_rows_are_permuted(model):
    opened = open_gguf(model[0])
    rows = opened.rows(Q_PROJ, slice(30, 50))
    assert rows.shape == (20, 256)
    assert np.array_equal(rows.data, model[1][Q_PROJ][30:50])
    packed = opened.packed(Q_PROJ, slice(30, 50))
    assert np.array_equal(packed.scales, opened.packed(Q_PROJ, slice(None)).scales[30:50])


def test_head_of_its_own_is_read(tmp_path):
    write_gguf(tmp_path / "m.gguf", config=untied())
    assert not open_gguf(tmp_path / "m.gguf").config.tie_word_embeddings


def untied():
    from dataclasses import replace

    return replace(CONFIG, tie_word_embeddings=False)


def test_shards_are_read_from_the_first_and_refused_from_another(tmp_path):
    values = write_gguf(tmp_path / "whole.gguf", "Q8_0")
    _split(tmp_path / "whole.gguf", tmp_path)
    opened = open_gguf(tmp_path / "m-00001-of-00002.gguf")
    assert np.array_equal(opened.float32(Q_PROJ), values[Q_PROJ])
    with pytest.raises(WeightsError, match=r"shard 2 of 2: open the first, m-00001-of-00002.gguf"):
        open_gguf(tmp_path / "m-00002-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(WeightsError, match=r"m-00002-of-00002.gguf.*is missing"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")


def _split(whole, folder):
    """Two shards as llama.cpp's gguf-split writes them."""
    reader = gguf.GGUFReader(whole)
    middle = len(reader.tensors) // 2
    for number, tensors in enumerate([reader.tensors[:middle], reader.tensors[middle:]]):
        writer = gguf.GGUFWriter(folder / f"m-0000{number + 1}-of-00002.gguf", "llama")
        if number == 0:
            for key, field in reader.fields.items():
                if key.startswith("llama."):
                    writer.add_key_value(key, field.contents(), field.types[0])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_count": 8}, "llama.expert_count: got 8, must be 0"),
        ({"block_count": 10**9}, "llama.block_count: got 1000000000, but the file has 20 tensors"),
        ({"rope.dimension_count": 32, "attention.key_length": 64}, "must be equal"),
        ({"feed_forward_length": 2**31}, "mlp.down_proj.weight: shape"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(tmp_path, change, message):
    write_gguf(tmp_path / "m.gguf", metadata=change)
    with pytest.raises(TinyllamaError, match=message) as error:
        open_gguf(tmp_path / "m.gguf")
    assert str(tmp_path / "m.gguf") in str(error.value)


@pytest.mark.parametrize(("key", "found"), [("architecture", "qwen2"), ("type", "adapter")])
def test_other_architectures_and_adapters_are_refused_by_name(tmp_path, key, found):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama" if key == "type" else found)
    if key == "type":
        writer.add_string("general.type", found)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(WeightsError, match=f"general.{key}: got '{found}'"):
        open_gguf(tmp_path / "m.gguf")


def llama3_factors(factor, theta, count, original=8192):
    """As convert_hf_to_gguf.py of llama.cpp computes them."""
    table = []
    for i in range(count):
        wavelength = 2 * np.pi * theta ** (i / count)
        if wavelength < original / 4:
            table.append(1)
        elif wavelength > original:
            table.append(factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            table.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(table, np.float32)


@pytest.mark.parametrize("factor", [8, 32])
def test_table_of_llama_3_becomes_its_parameters(tmp_path, monkeypatch, factor):
    seen = {}
    from tinyllama.formats import gguf as ours

    def config_from_hf(values, source):
        seen.update(values)
        return CONFIG

    monkeypatch.setattr(ours, "config_from_hf", config_from_hf)
    table = llama3_factors(factor, CONFIG.rope_theta, 32)
    write_gguf(tmp_path / "m.gguf", change=lambda w: w.add_tensor("rope_freqs.weight", table))
    open_gguf(tmp_path / "m.gguf")
    assert seen["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_another_table_of_rope_factors_is_refused_by_name(tmp_path):
    table = llama3_factors(8, CONFIG.rope_theta, 32, original=4096)
    write_gguf(tmp_path / "m.gguf", change=lambda w: w.add_tensor("rope_freqs.weight", table))
    with pytest.raises(WeightsError, match=r"rope_freqs.weight: holds factors that are not"):
        open_gguf(tmp_path / "m.gguf")


# ---- files that lie


def text(value):
    return struct.pack("<Q", len(value)) + value


def start(tensors=0, entries=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def info(name, dims=(32,), kind=0, offset=0):
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


LIES = {
    "empty": (b"", "empty"),
    "short": (b"GGUF\3\0", "truncated or damaged: the version"),
    "magic": (b"GGML" + bytes(60), "begins with b'GGML', must begin with b'GGUF'"),
    "version": (start(version=1), "version 1; versions 2 and 3"),
    "big endian": (start(version=3 << 24), "a big-endian file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
    "web page": (b"\n<!DOCTYPE html><html>", "a page of HTML"),
    "entries": (start(entries=2**60), f"damaged: {2**60} metadata"),
    "tensors": (start(tensors=2**60), f"damaged: {2**60} tensors"),
    "key": (start(entries=1) + struct.pack("<Q", 2**60), "a key of the metadata ends after"),
    "type": (start(entries=1) + text(b"k") + struct.pack("<I", 99), "k: damaged: no metadata has"),
    "twice": (
        start(entries=2) + 2 * (text(b"k") + struct.pack("<IB", 0, 1)),
        "k: twice in the metadata",
    ),
    "array": (
        start(entries=1) + text(b"k") + struct.pack("<IIQ", 9, 4, 2**60),
        "k ends after the last byte",
    ),
    "strings": (
        start(entries=1) + text(b"k") + struct.pack("<IIQ", 9, 8, 2**60),
        f"k: damaged: {2**60} strings",
    ),
    "nested": (
        start(entries=1) + text(b"k") + struct.pack("<IIQ", 9, 9, 1),
        "no array has elements of type 9",
    ),
    "utf-8": (start(entries=1) + text(b"\xff"), "is not UTF-8"),
    "two lines": (start(1) + info(b"a\nb\x1b" + b"c" * 9999, ()), "a"),
    "dimensions": (start(1) + info(b"t", ()), "t: damaged: 0 dimensions"),
    "many dimensions": (start(1) + text(b"t") + struct.pack("<I", 2**31), "dimensions"),
    "unknown type": (start(1) + info(b"t", kind=10), "t: type Q2_K, must be one of F32, F16, Q4_0"),
    "huge": (start(1) + info(b"t", (2**60, 2**60)) + bytes(999), "t: truncated or damaged: F32"),
    "offset": (start(1) + info(b"t", offset=2**63) + bytes(999), "t: truncated or damaged: F32"),
    "unaligned": (start(1) + info(b"t", offset=7) + bytes(999), "offset 7 is no multiple of 32"),
    "blocks": (start(1) + info(b"t", (33,), 2) + bytes(999), "rows of 33, but blocks of Q4_0"),
    "same name": (start(2) + 2 * info(b"t") + bytes(999), "t: twice in the file"),
    "overlap": (
        start(2) + info(b"t") + info(b"u", offset=64) + bytes(999),
        "u: damaged: overlaps with t",
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_a_lying_file_is_refused_in_one_line_that_names_it(tmp_path, case):
    data, message = LIES[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    began = time.perf_counter()
    with pytest.raises(WeightsError) as error:
        open_gguf(path)
    assert time.perf_counter() - began < 1
    assert message in str(error.value)
    text = str(error.value)
    assert text.startswith(str(path)) and text.isprintable() and len(text) < len(str(path)) + 500


def test_pipes_folders_and_missing_files_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    for name, message in (
        ("pipe.gguf", "not a file"),
        ("none.gguf", "cannot be read"),
        ("", "not"),
    ):
        with pytest.raises(WeightsError, match=message):
            open_gguf(tmp_path / name)


def test_a_header_of_many_strings_takes_neither_a_second_nor_200_megabytes(tmp_path):
    path = tmp_path / "strings.gguf"
    head = start(entries=1) + text(b"k") + struct.pack("<IIQ", 9, 8, MAX_STRINGS)
    path.write_bytes(head + struct.pack("<Q8s", 8, b"a" * 8) * (MAX_STRINGS - 1))
    before = resident_bytes(peak=True)
    began = time.process_time()
    with pytest.raises(WeightsError, match="truncated"):
        open_gguf(path)
    assert time.process_time() - began < within(2)  # of a machine that runs other tests
    assert resident_bytes(peak=True) - before < 200_000 << 10


@settings(
    max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_bytes_never_raise_anything_but_our_errors(model, tmp_path, data):
    original = model[0].read_bytes()
    header_bytes = 3400
    damaged = bytearray(original[: data.draw(st.integers(1, len(original)))])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(damaged), header_bytes) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "fuzzed.gguf"
    path.write_bytes(damaged)
    try:
        opened = GgufFile(path)
        opened.check()
        for name in opened.names:
            opened.float32(name)
    except TinyllamaError as error:
        assert str(path) in str(error)
