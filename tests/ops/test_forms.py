"""The table of forms: which form runs, and that an operation's forms have one signature."""

import importlib
import inspect
import pkgutil

import pytest
from tinygrad import Tensor, dtypes

from tinyllama import ops
from tinyllama.ops import forms


def modules():
    found = [
        importlib.import_module(f"tinyllama.ops.{m.name}")
        for m in pkgutil.iter_modules(ops.__path__)
    ]
    return {module.__name__.rpartition(".")[2]: module for module in found}


def pairs():
    """(operation, its form for the CPU, its portable form) of every file."""
    for file, module in modules().items():
        for name, cpu in vars(module).items():
            if name.endswith("_cpu") and inspect.isfunction(cpu):
                portable = getattr(module, f"{name.removesuffix('_cpu')}_portable")
                yield pytest.param(cpu, portable, id=f"{file}{name.removesuffix('_cpu')}")


@pytest.mark.parametrize(("cpu", "portable"), [*pairs()])
def test_both_forms_of_an_operation_have_one_signature(cpu, portable):
    ours, theirs = (inspect.signature(form) for form in (cpu, portable))
    names = [[p.lstrip("_") for p in s.parameters] for s in (ours, theirs)]
    assert names[0] == names[1]
    kinds = [
        ([p.annotation for p in s.parameters.values()], s.return_annotation) for s in (ours, theirs)
    ]
    assert kinds[0] == kinds[1]


def test_every_operation_is_there():
    found = {param.id.split("_")[0] for param in pairs()}
    assert found >= {"adamw", "attention", "embedding", "int4", "matmul", "rms", "rope", "swiglu"}


def test_the_first_form_that_can_compute_the_tensors_is_chosen(monkeypatch):
    floats, ints = Tensor.empty(3, device="CPU"), Tensor.empty(3, dtype=dtypes.int32, device="CPU")
    assert forms.choose(floats, portable="p", cpu="c") == "c"
    assert forms.choose(floats, ints, portable="p", cpu="c") == "p"
    assert forms.choose(floats, Tensor.empty(3, device="NULL"), portable="p", cpu="c") == "p"
    monkeypatch.setattr(forms, "clang_compiles", lambda: False)
    assert forms.choose(floats, portable="p", cpu="c") == "p"


def test_the_switch_leaves_the_portable_form(monkeypatch):
    monkeypatch.setenv("TINYLLAMA_KERNELS", "0")
    assert forms.choose(Tensor.empty(3, device="CPU"), portable="p", cpu="c") == "p"


def test_each_form_can_be_forced_and_the_innermost_counts():
    ints = Tensor.empty(3, dtype=dtypes.int32, device="CPU")
    with forms.forced("cpu"):
        assert forms.choose(ints, portable="p", cpu="c") == "c"
        with forms.forced("portable"):
            assert forms.chosen(Tensor.empty(3, device="CPU")) == "portable"
        assert forms.chosen(ints) == "cpu"
    assert forms.chosen(ints) == "portable"
