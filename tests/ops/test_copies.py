"""Copies of weights that products read: the same bits as from the weights themselves."""

import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import Ops

from tinyllama.ops import copies, forms
from tinyllama.ops.matmul import FEW_ROWS, linear
from tinyllama.runtime import c_kernel
from tinyllama.runtime.storage import read, write

KERNELS = Path(__file__).parent / "kernels"
NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
needs_bf16_products = pytest.mark.skipif(
    not c_kernel.has_bf16_products(), reason="this processor does not multiply bfloat16"
)


def made(values: np.ndarray, dtype=dtypes.float32) -> Tensor:
    tensor = Tensor.empty(*values.shape, dtype=dtype)
    write(tensor, values)
    return tensor


def pair(out: int, into: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and its copy."""
    values = np.random.default_rng(seed).standard_normal((out, into)).astype(np.float32)
    weight, copy = made(values), made(np.zeros((out, into), np.uint16), dtypes.bfloat16)
    Tensor.realize(*copies.copied([weight], [copy]))
    return weight, copy


def activations(rows: int, width: int, seed: int = 1) -> Tensor:
    values = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return Tensor(values).cast(dtypes.bfloat16).realize()


@pytest.mark.parametrize("flags", ["-DTILE_AMX -DTILE_IN_C", ""])
@pytest.mark.parametrize("layout", [0, 1])
def test_a_product_of_rounded_numbers_has_the_same_bits(layout, flags, tmp_path):
    """With AMX's registers in C, and with this processor's vectors; forward, and back to x."""
    printed = []
    for stored in (0, 1):
        program = tmp_path / f"stored-{stored}"
        build = ["clang", "-O1", "-fno-math-errno", "-Wno-psabi", NATIVE, *flags.split()]
        build += [f"-DLAYOUT={layout}", f"-DB_T={stored}", str(KERNELS / "rounded_b.c")]
        subprocess.run([*build, "-o", str(program), "-lm"], check=True)
        done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
        printed.append(done.stdout)
    assert printed[0] == printed[1]
    assert len(set(printed[0].splitlines())) == 64


@pytest.mark.parametrize("form", ["portable", "cpu"])
def test_copies_are_the_nearest_numbers(form):
    values = np.random.default_rng(0).standard_normal((33, 31)).astype(np.float32)
    values[0, :4] = 1.00390625, 1.01171875, -0.0, 3e38  # two ties, to even
    with forms.forced(form):
        weight, copy = made(values), made(np.zeros(values.shape, np.uint16), dtypes.bfloat16)
        Tensor.realize(*copies.copied([weight], [copy]))
    bits = values.view(np.uint32)
    assert (read(copy) == (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).all()
    assert read(copy)[0, :2].tolist() == [0x3F80, 0x3F82]


@needs_bf16_products
@pytest.mark.parametrize("rows", [FEW_ROWS + 1, 66])
def test_the_processors_products_read_the_copy_and_give_the_same_bits(rows):
    weight, copy = pair(40, 48)
    x = activations(rows, 48)
    with forms.forced("cpu"):
        before = linear(x, weight).realize()
        out = linear(x, weight)
        gradients = out.gradient(x, weight, gradient=activations(rows, 40, seed=2))
        results = copies.reading_copies([out, *gradients], [(weight, copy)])
        calls = {u for t in results for u in t.uop.toposort() if u.op is Ops.CALL}
        Tensor.realize(*results)
    assert (read(results[0]) == read(before)).all()
    readers = [u for u in calls if copy.uop in u.src]
    assert len(readers) == 2  # forward, and the gradient of x
    assert not any(weight.uop in u.src for u in calls)
    # Not the weight's numbers by another way: other numbers in the copy change the result.
    write(copy, np.zeros(copy.shape, np.uint16))
    again = copies.reading_copies([linear(x, weight)], [(weight, copy)])[0]
    assert not read(again.realize()).any()


@needs_bf16_products
def test_few_rows_read_the_weight_which_they_do_not_round():
    weight, copy = pair(40, 48)
    with forms.forced("cpu"):
        out = linear(activations(FEW_ROWS, 48), weight)
        assert copies.reading_copies([out], [(weight, copy)])[0].uop is out.uop


def test_the_portable_form_reads_the_copy_in_place_of_a_cast():
    weight, copy = pair(40, 48)
    x = activations(66, 48)
    with forms.forced("portable"):
        before = linear(x, weight).realize()
        after = copies.reading_copies([linear(x, weight)], [(weight, copy)])[0]
        assert weight.uop not in after.uop.toposort()
        assert (read(after.realize()) == read(before)).all()


def test_weights_without_a_copy_are_read_as_before():
    weight, other = pair(40, 48)[0], pair(40, 48, seed=3)
    out = linear(activations(66, 48), weight)
    assert copies.reading_copies([out], [other])[0].uop is out.uop
    assert copies.reading_copies([out], [])[0].uop is out.uop
