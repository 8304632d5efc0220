"""The safetensors reader and writer, against the official library in both directions."""

import hashlib
import json
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama.errors import WeightsError
from tinyllama.formats.dtypes import (
    RawArray,
    convert,
    to_bfloat16,
    to_float32,
)
from tinyllama.formats.safetensors import (
    MAX_HEADER_BYTES,
    LazyArray,
    SafetensorsFile,
    read_header,
    write_safetensors,
)

official = pytest.importorskip("safetensors")
official_numpy = pytest.importorskip("safetensors.numpy")

NUMPY_TYPES = ["?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8"]


def random_array(rng, dtype, shape):
    size = int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
    data = rng.integers(0, 2 if dtype == "?" else 256, size, dtype=np.uint8)
    return data.view(dtype).reshape(shape)


def file_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


arrays = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(NUMPY_TYPES), st.lists(st.integers(0, 4), max_size=3)),
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(arrays, st.integers(0, 2**32 - 1))
def test_written_file_equals_the_official_librarys_byte_for_byte(tmp_path_factory, specs, seed):
    rng = np.random.default_rng(seed)
    tensors = {name: random_array(rng, *spec) for name, spec in specs.items()}
    path = tmp_path_factory.getbasetemp() / "ours.safetensors"
    digest = write_safetensors(path, tensors)
    theirs = official_numpy.save(tensors, metadata={"format": "pt"})
    assert path.read_bytes() == theirs
    assert digest == (hashlib.sha256(theirs).hexdigest(), len(theirs))
    read = SafetensorsFile(path)
    assert read.metadata == {"format": "pt"}
    for name, array in tensors.items():
        assert read.array(name).dtype == array.dtype
        assert read.shape(name) == array.shape
        assert read.array(name).tobytes() == array.tobytes()


def test_bfloat16_travels_as_bits_and_the_official_library_sees_its_type(tmp_path):
    bits = np.array([[0x3F80, 0x4000, 0xC040]], np.uint16)
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": RawArray("BF16", (1, 3), bits)})
    with official.safe_open(path, "numpy") as file:
        assert file.get_slice("w").get_dtype() == "BF16"
        assert file.get_slice("w").get_shape() == [1, 3]
        assert file.metadata() == {"format": "pt"}
    read = SafetensorsFile(path)
    assert (read.names, read.dtype("w")) == (("w",), "BF16")
    assert read.array("w").dtype == np.uint16
    np.testing.assert_array_equal(read.array("w"), bits)
    np.testing.assert_array_equal(read.float32("w"), [[1.0, 2.0, -3.0]])


def test_every_array_is_aligned_to_its_type_and_read_only(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"a": np.ones(3, np.uint8), "b": np.ones(3, np.float16), "c": np.ones(3)}
    write_safetensors(path, tensors)
    assert list(read_header(path).tensors) == ["c", "b", "a"]
    read = SafetensorsFile(path)
    for name in tensors:
        assert read.array(name).flags.aligned
        assert read.tensors[name].offset % read.array(name).itemsize == 0
        with pytest.raises(ValueError, match="read-only"):
            read.array(name)[0] = 2


def test_unpadded_header_of_another_writer_gives_aligned_arrays(tmp_path):
    path = tmp_path / "a.safetensors"
    data = np.array([1.5, -2.5], np.float32)
    header = json.dumps({"w": entry()}).encode()
    header += b" " * ((1 - len(header)) % 8)  # data at 8 k + 1
    path.write_bytes(file_bytes(header, data.tobytes()))
    array = SafetensorsFile(path).array("w")
    assert array.flags.aligned
    np.testing.assert_array_equal(array, data)


def test_transposed_and_big_endian_arrays_are_stored_row_major_little_endian(tmp_path):
    path = tmp_path / "a.safetensors"
    base = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_safetensors(path, {"t": base.T, "b": base.astype(">f4")})
    loaded = official_numpy.load_file(path)
    np.testing.assert_array_equal(loaded["t"], base.T)
    np.testing.assert_array_equal(loaded["b"], base)


def test_one_tensor_is_in_memory_at_a_time_and_each_is_loaded_once(tmp_path):
    alive, most, loads = [], [], []

    class Watched(np.ndarray):
        pass

    def source(value):
        def load():
            array = np.full((3, 700_000), value, np.float32).view(Watched)
            alive.append(weakref.ref(array))
            most.append(sum(ref() is not None for ref in alive))
            loads.append(value)
            return array

        return load

    path = tmp_path / "a.safetensors"
    tensors = {f"w{i}": LazyArray("F32", (3, 700_000), source(i)) for i in range(4)}
    write_safetensors(path, tensors)
    assert loads == [0, 1, 2, 3]
    assert max(most) == 1
    read = SafetensorsFile(path)
    assert all((read.array(f"w{i}") == i).all() for i in range(4))


def test_plain_callable_is_a_source(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": lambda: np.arange(3, dtype=np.int32)})
    np.testing.assert_array_equal(SafetensorsFile(path).array("w"), [0, 1, 2])


def test_source_of_another_file_is_copied_bit_for_bit(tmp_path):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    bits = np.array([0x7FC1, 0x3F80, 0xFF80], np.uint16)  # a NaN with a payload, 1, -inf
    tensors = {"b": RawArray("BF16", (3,), bits), "f": np.array([[np.nan, 1]], np.float16)}
    write_safetensors(first, tensors)
    read = SafetensorsFile(first)
    write_safetensors(second, {name: read.source(name) for name in read.names})
    read.forget("b")
    assert read.array("b").tolist() == bits.tolist()  # forgotten pages come back
    assert first.read_bytes() == second.read_bytes()


def test_lazy_array_is_converted_to_its_declared_type(tmp_path):
    path = tmp_path / "a.safetensors"
    values = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    write_safetensors(
        path,
        {
            "b": LazyArray("BF16", (3, 5), lambda: values),
            "h": LazyArray("F16", (3, 5), lambda: values),
            "f": LazyArray("F32", (3, 5), lambda: RawArray("BF16", (3, 5), to_bfloat16(values))),
        },
    )
    read = SafetensorsFile(path)
    np.testing.assert_array_equal(read.array("b"), to_bfloat16(values))
    np.testing.assert_array_equal(read.array("h"), values.astype(np.float16))
    np.testing.assert_array_equal(read.array("f"), read.float32("b"))


def test_bfloat16_rounds_to_nearest_even():
    bits = [0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F818000, 0x3F817FFF, 0xBF818001]
    want = [0x3F80, 0x3F80, 0x3F80, 0x3F81, 0x3F82, 0x3F81, 0xBF82]
    assert to_bfloat16(np.array(bits, np.uint32).view(np.float32)).tolist() == want
    special = np.array([0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0, 1 << 31], np.uint32)
    want = [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0, 0x8000]
    assert to_bfloat16(special.view(np.float32)).tolist() == want


def test_every_bfloat16_survives_float32_and_back():
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    values = to_float32("x", RawArray("BF16", bits.shape, bits))
    quiet = np.where(np.isnan(values), bits | 0x40, bits)
    np.testing.assert_array_equal(to_bfloat16(values), quiet)


@pytest.mark.parametrize(
    ("value", "target", "kept"),
    [
        (65519.0, "F16", True),
        (65520.0, "F16", False),
        (np.inf, "F16", True),
        (3.38e38, "BF16", True),
        (3.4e38, "BF16", False),
        (-np.inf, "BF16", True),
    ],
)
def test_value_that_would_become_infinite_is_refused(value, target, kept):
    array = np.array([0, value], np.float32)
    if kept:
        convert("w", array, target)
    else:
        with pytest.raises(
            WeightsError, match=rf"w: {value:g} is too large for {target}".replace("+", r"\+")
        ):
            convert("w", array, target)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": np.array(["a"])}, "w: numpy type <U1 has no safetensors name"),
        ({"w": np.array([object()])}, "w: numpy type object has no safetensors name"),
        ({"w": RawArray("BF16", (2,), np.zeros(2, np.int16))}, "w: a int16 array does not hold"),
        ({"w": RawArray("BF16", (3,), np.zeros(2, np.uint16))}, r"w: 2 elements for shape \(3,\)"),
        ({"w": LazyArray("F32", (3,), lambda: np.zeros(2, np.float32))}, r"w: shape \(2,\), must"),
        ({"w": LazyArray("F32", (2,), lambda: np.zeros(2, np.int32))}, "w: type I32, must be one"),
        ({"w": LazyArray("I32", (2,), lambda: np.zeros(2, np.float32))}, "F32 cannot be stored as"),
        ({"__metadata__": np.zeros(1)}, "__metadata__ is not a tensor name"),
    ],
)
def test_tensor_that_cannot_be_stored_is_named(tmp_path, tensors, message):
    with pytest.raises(WeightsError, match=message):
        write_safetensors(tmp_path / "a.safetensors", tensors)


EIGHT = b"\0" * 8
DAMAGED = {
    "empty": (b"", "0 bytes, too short"),
    "seven bytes": (b"\0" * 7, "7 bytes, too short"),
    "header too large": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), "a header of 4000001"),
    "header beyond the end": (file_bytes({"w": entry()}, EIGHT)[:40], "truncated: the header ends"),
    "not utf-8": (file_bytes(b'{"\xff":1}'), "the header is not JSON"),
    "not json": (file_bytes(b"{"), "the header is not JSON"),
    "nan": (file_bytes(b'{"w":{"dtype":"F32","shape":[],"data_offsets":[0,0],"x":NaN}}'), "NaN"),
    "half a surrogate": (file_bytes(b'{"\\ud800":{}}'), "the header is not JSON"),
    "deep": (file_bytes(b"[" * 100_000), "the header is not JSON"),
    "list": (file_bytes([]), "the header is not a JSON object"),
    "metadata": (file_bytes({"__metadata__": {"a": 1}}), "__metadata__: must map strings"),
    "metadata list": (file_bytes({"__metadata__": []}), "__metadata__: must map strings"),
    "entry": (file_bytes({"w": 1}), "w: must be an object, got 1"),
    "dtype": (file_bytes({"w": entry("F31")}, EIGHT), "w: dtype: got 'F31', must be one of BOOL"),
    "no dtype": (file_bytes({"w": {"shape": [], "data_offsets": [0, 0]}}), "w: dtype: got None"),
    "negative": (file_bytes({"w": entry(shape=(-2,))}, EIGHT), r"w: shape: got \[-2\]"),
    "float": (file_bytes({"w": entry(shape=(2.0,))}, EIGHT), r"w: shape: got \[2.0\]"),
    "true": (file_bytes({"w": entry(shape=(True,))}, EIGHT), r"w: shape: got \[True\]"),
    "offsets": (file_bytes({"w": entry(offsets=(8, 0))}, EIGHT), r"w: data_offsets: got \[8, 0\]"),
    "three": (file_bytes({"w": entry(offsets=(0, 8, 8))}, EIGHT), "w: data_offsets: got"),
    "size": (file_bytes({"w": entry(shape=(3,))}, EIGHT), r"w: 8 bytes, but F32 of shape \[3\]"),
    "overflow": (
        file_bytes({"w": entry(shape=(1 << 62, 4))}, EIGHT),
        "w: 8 bytes, but F32 of shape",
    ),
    "half a byte": (
        file_bytes({"w": entry("F4", (3,), (0, 1))}, b"\0"),
        "F4 of shape .* takes 1.5",
    ),
    "gap": (file_bytes({"w": entry(offsets=(8, 16))}, EIGHT * 2), "w: begins at byte .* [(]a gap"),
    "overlap": (
        file_bytes({"v": entry(), "w": entry(offsets=(4, 12))}, EIGHT * 2),
        "w: begins at byte .* [(]an overlap",
    ),
    "too short": (file_bytes({"w": entry()}, EIGHT[:7]), r"its header describes \d+ \(truncated\)"),
    "too long": (file_bytes({"w": entry()}, EIGHT * 2), "bytes after the last tensor"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_is_refused_by_name_as_the_official_library_refuses_it(tmp_path, case):
    data, message = DAMAGED[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=f"bad.safetensors: .*{message}"):
        read_header(path)
    with pytest.raises(WeightsError, match=message):
        SafetensorsFile(path)
    with pytest.raises((official.SafetensorError, OSError)):
        official.safe_open(path, "numpy").__enter__()


def test_repeated_name_is_refused(tmp_path):
    text = json.dumps(entry())
    path = tmp_path / "bad.safetensors"
    path.write_bytes(file_bytes(f'{{"w":{text},"w":{text}}}'.encode(), EIGHT))
    with pytest.raises(WeightsError, match=r"bad.safetensors: 'w' appears twice in the header"):
        read_header(path)


def test_absent_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"none.safetensors: missing$"):
        SafetensorsFile(tmp_path / "none.safetensors")


def test_unknown_tensor_and_unreadable_type_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_bytes({"w": entry("F4", (2,), (0, 1))}, b"\0"))
    read = SafetensorsFile(path)
    with pytest.raises(WeightsError, match=r"a.safetensors: v: no such tensor"):
        read.array("v")
    with pytest.raises(WeightsError, match=r"a.safetensors: w: type F4 cannot be read here"):
        read.array("w")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_edited_headers_are_accepted_only_where_the_official_library_accepts_them(
    tmp_path_factory, data
):
    """Any few bytes of the first part of a file replaced: no crash, no acceptance of our own."""
    tensors = {"a": np.ones((2, 2), np.float32), "b": np.ones(3, np.int8)}
    content = bytearray(official_numpy.save(tensors, metadata={"format": "pt"}))
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.sampled_from(b'0123456789{}[]":, FIU\0\xff'))
    path = tmp_path_factory.getbasetemp() / "edited.safetensors"
    path.write_bytes(content)
    try:
        official.safe_open(path, "numpy").__enter__()
        theirs = True
    except (official.SafetensorError, OSError):
        theirs = False
    try:
        SafetensorsFile(path)
        ours = True
    except WeightsError as error:
        ours = False
        theirs = theirs and "appears twice" not in str(error)  # there we are stricter
    assert ours == theirs
