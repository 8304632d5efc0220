"""The table of forms: which form runs, and that an operation's forms have one signature."""

import importlib
import inspect
import pkgutil

import pytest
from tinygrad import Tensor, dtypes

from tinyllama import ops
from tinyllama.ops import forms
from tinyllama.runtime.blocks import UnsupportedSize
from tinyllama.runtime.kernel import LARGEST


def modules():
    found = [
        importlib.import_module(f"tinyllama.ops.{m.name}")
        for m in pkgutil.iter_modules(ops.__path__)
    ]
    return {module.__name__.rpartition(".")[2]: module for module in found}


SUFFIXES = ("portable", "cpu", "gpu", "kernel")  # `kernel`: for the CPU and for a GPU


def pairs():
    """(operation's first form, another of its forms) of every file."""
    for file, module in modules().items():
        there = {n: f for n, f in vars(module).items() if inspect.isfunction(f)}
        for stem in sorted({name.rpartition("_")[0] for name in there}):
            names = [name for suffix in SUFFIXES if (name := f"{stem}_{suffix}") in there]
            for name in names[1:]:
                yield pytest.param(there[names[0]], there[name], id=f"{file}{name}")


@pytest.mark.parametrize(("first", "other"), [*pairs()])
def test_all_forms_of_an_operation_have_one_signature(first, other):
    ours, theirs = (inspect.signature(form) for form in (first, other))
    names = [[p.lstrip("_") for p in s.parameters] for s in (ours, theirs)]
    assert names[0] == names[1]
    kinds = [
        ([p.annotation for p in s.parameters.values()], s.return_annotation) for s in (ours, theirs)
    ]
    assert kinds[0] == kinds[1]


def test_every_operation_is_there():
    found = [param.id for param in pairs()]
    for file in ("adamw", "attention", "embedding", "int4", "matmul", "rms_norm", "rope", "swiglu"):
        assert any(name.startswith(f"{file}_") for name in found), file


def forms_of_an_operation():
    """Three forms, each of which returns its own name."""
    return {"portable": lambda: "portable", "cpu": lambda: "cpu", "gpu": lambda: "gpu"}


def choice(*tensors):
    return forms.choose(*tensors, **forms_of_an_operation())()


def test_the_first_form_that_can_compute_the_tensors_is_chosen(monkeypatch):
    floats, ints = Tensor.empty(3, device="CPU"), Tensor.empty(3, dtype=dtypes.int32, device="CPU")
    assert choice(floats) == "cpu"
    assert choice(floats, ints) == "portable"
    assert choice(floats, Tensor.empty(3, device="NULL")) == "portable"
    monkeypatch.setattr(forms, "clang_compiles", lambda: False)
    assert choice(floats) == "portable"


@pytest.mark.parametrize("shape", [(LARGEST - 1, 3), (3, LARGEST - 1), (LARGEST - 1,), (8, 9, 7)])
@pytest.mark.parametrize("device, kernels", [("CPU", "cpu"), ("NULL", "gpu")])
def test_rows_and_columns_are_as_many_as_kernels_count(shape, device, kernels, monkeypatch):
    monkeypatch.setattr(forms, "dialect_of", {"NULL": "cuda"}.get)
    assert choice(Tensor.empty(*shape, device=device)) == kernels
    one_more = tuple(n + 1 if n == LARGEST - 1 else n for n in shape)
    expected = kernels if one_more == shape else "portable"
    assert choice(Tensor.empty(*one_more, device=device)) == expected
    assert choice(Tensor.empty(2, LARGEST // 2, 3, device=device)) == "portable"


def test_kernels_for_a_gpu_compute_what_lies_on_one(monkeypatch):
    floats, ints = (Tensor.empty(3, dtype=d, device="NULL") for d in (dtypes.half, dtypes.int32))
    assert choice(floats) == "portable"  # which renders no language of a GPU
    monkeypatch.setattr(forms, "dialect_of", {"NULL": "cuda"}.get)
    assert choice(floats) == "gpu"
    assert choice(floats, floats.float()) == "gpu"
    assert choice(floats, ints) == choice(floats, Tensor.empty(3, device="CPU")) == "portable"
    monkeypatch.setenv("TINYLLAMA_KERNELS", "0")
    assert choice(floats) == "portable"


def test_sizes_that_a_kernel_does_not_take_are_left_to_the_portable_form():
    def refusing():
        raise UnsupportedSize("too odd")

    there = forms_of_an_operation()
    with forms.forced("gpu"):
        tensor = Tensor.empty(3, device="CPU")
        assert forms.choose(tensor, **there)() == "gpu"
        assert forms.choose(tensor, **there | {"gpu": refusing})() == "portable"
        assert forms.choose(tensor, **there | {"gpu": None})() == "portable"


def test_the_switch_leaves_the_portable_form(monkeypatch):
    monkeypatch.setenv("TINYLLAMA_KERNELS", "0")
    assert choice(Tensor.empty(3, device="CPU")) == "portable"


@pytest.mark.parametrize("form", forms.APPLIES)
def test_each_form_can_be_forced_and_the_innermost_counts(form):
    ints = Tensor.empty(3, dtype=dtypes.int32, device="CPU")
    with forms.forced(form):
        assert choice(ints) == form
        with forms.forced("portable"):
            assert forms.chosen(Tensor.empty(3, device="CPU")) == "portable"
        assert forms.chosen(ints) == form
    assert forms.chosen(ints) == "portable"
