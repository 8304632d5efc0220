"""What tinyllama changes in tinygrad: declared, installed once, and switched off one by one."""

import ast
import importlib
import importlib.metadata
import inspect
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runs_helpers import ROOT, config_file, environment, printed_json, run_command
from tinygrad import Tensor, dtypes

from tinyllama.errors import DeviceError
from tinyllama.runtime import fills, patches
from tinyllama.runtime.capture import captured
from tinyllama.runtime.cpu import cpu_device
from tinyllama.runtime.patches import PATCHES, install, patch_table
from tinyllama.runtime.patches.patch import Patch
from tinyllama.runtime.storage import read, zero_in_background
from tinyllama.system import device

NAMES = [patch.name for patch in PATCHES]
# All but what replaces something only while it is used.
INSTALLED = [patch.name for patch in PATCHES if patch.replaces]
SWITCHABLE = [patch.name for patch in PATCHES if not patch.needed]
DOCUMENT = ROOT / "docs" / "tinygrad.md"
# Three steps of training, and what stands in tinygrad at the end.
STEPS = f"""
import json, sys
from tinyllama.system import device
device.select()
sys.path[:0] = [{str(ROOT / "tests/helpers")!r}, {str(ROOT / "tests/runtime")!r}]
from test_patches import installed
from model_helpers import SQUARE, build, random_batch
from tinyllama.config import TrainingConfig
from tinyllama.train.optimizer import AdamW
from tinyllama.train.step import TrainStep

model = build(SQUARE)
optimizer = AdamW(model.state_dict(), TrainingConfig())
step = TrainStep(model, optimizer, 1)
losses = [step([random_batch(SQUARE, seed=n)], n + 1, 0.01).loss for n in range(3)]
print(json.dumps([losses, installed()]))
"""


def documented(text: str) -> str:
    """The document with the table of patches as they declare themselves."""
    begin, rest = text.split("<!-- begin patches", 1)
    first, rest = rest.split("\n", 1)
    _, end = rest.split("<!-- end patches -->", 1)
    return f"{begin}<!-- begin patches{first}\n{patch_table()}\n<!-- end patches -->{end}"


def value_of(name: str) -> object:
    """What a full name in tinygrad stands for; None if there is no such thing."""
    if name in sys.modules:  # a look at its attributes would read a binding that is deferred
        return sys.modules[name]
    words = name.split(".")
    for length in range(len(words) - 1, 0, -1):
        try:
            value: object = importlib.import_module(".".join(words[:length]))
        except ModuleNotFoundError:
            continue
        for word in words[length:]:
            value = inspect.getattr_static(value, word, None)
        return value
    return None


def is_ours(value: object) -> bool:
    """Whether a value is made by one of the files that hold patches."""
    function = value.fget if isinstance(value, property) else value
    return str(getattr(function, "__module__", "")).startswith("tinyllama.")


def installed() -> list[str]:
    """Names of the patches whose functions stand in tinygrad."""
    found = []
    for patch in PATCHES:
        if patch.name == "bfloat16":  # a table and rules instead of a function
            table = value_of(patch.replaces[0])
            assert isinstance(table, dict)
            found += [patch.name] * (table.get(dtypes.bfloat16) == "unsigned short")
        elif patch.name == "deferred_llvm":  # a module that is read when it is used
            found += [patch.name] * (type(value_of(patch.replaces[0])).__name__ == "_LazyModule")
        elif patch.replaces and all(is_ours(value_of(name)) for name in patch.replaces):
            found.append(patch.name)
    return found


def run_steps(**variables: str) -> tuple[list[float], list[str]]:
    losses, names = printed_json("-c", STEPS, **variables)
    return losses, names


@pytest.fixture(scope="module")
def with_all() -> tuple[list[float], list[str]]:
    return run_steps()


@pytest.mark.parametrize("patch", PATCHES, ids=NAMES)
def test_a_patch_declares_what_it_replaces_and_a_test_that_exists(patch: Patch) -> None:
    for name in patch.replaces:
        assert name.startswith("tinygrad.")
        # `graph` is an attribute of each device.
        assert value_of(name) is not None or hasattr(cpu_device(), name.rpartition(".")[2])
    assert patch.why
    file, _, test = patch.test.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_documentation_has_the_table_of_the_declarations() -> None:
    """`python tests/runtime/test_patches.py` writes it."""
    assert documented(DOCUMENT.read_text()) == DOCUMENT.read_text()


def test_every_file_of_patches_is_in_the_list() -> None:
    folder = Path(patches.__file__).parent
    assert {file.stem for file in folder.glob("*.py")} == {*NAMES, "__init__", "patch"}


def test_a_step_installs_every_patch(with_all: tuple[list[float], list[str]]) -> None:
    assert with_all[1] == INSTALLED


def test_nothing_is_installed_on_import() -> None:
    code = f"""
import sys
sys.path[:0] = [{str(ROOT / "tests/helpers")!r}, {str(ROOT / "tests/runtime")!r}]
from test_patches import installed
import tinyllama.train.trainer, tinyllama.generate.generator
print(installed())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout.strip() == "[]"


def test_installing_twice_is_installing_once() -> None:
    names = install()
    replaced = [name for patch in PATCHES for name in patch.replaces]
    before = [value_of(name) for name in replaced]
    assert install() == names
    assert all(a is b for a, b in zip(before, map(value_of, replaced), strict=True))


@pytest.mark.parametrize("name", SWITCHABLE)
def test_a_step_computes_the_same_without(
    name: str, with_all: tuple[list[float], list[str]]
) -> None:
    losses, names = run_steps(TINYLLAMA_PATCHES_OFF=name)
    assert names == [other for other in INSTALLED if other != name]
    np.testing.assert_allclose(losses, with_all[0], rtol=1e-5)


def test_all_that_can_be_switched_off_are_switched_off_together(
    with_all: tuple[list[float], list[str]],
) -> None:
    losses, names = run_steps(TINYLLAMA_PATCHES_OFF=", ".join(SWITCHABLE))
    assert names == ["bfloat16", "kernel_sizes", "kernel_cache", "wait_when_lowered"]
    np.testing.assert_allclose(losses, with_all[0], rtol=1e-5)


def test_an_unknown_patch_is_refused_in_one_line(tmp_path: Path) -> None:
    words = ["train", config_file(tmp_path / "run"), "--quiet"]
    code, _, errors = run_command(*words, TINYLLAMA_PATCHES_OFF="huge_page")
    assert code == 2
    assert errors == (
        "TINYLLAMA_PATCHES_OFF: there is no patch 'huge_page', must be one of "
        "deferred_llvm, huge_pages, layout, native_launch, cubin, parallel_compilers, "
        "opencl_graph, free_steps, uninterrupted_compilers\n"
    )


@pytest.mark.parametrize("patch", [p for p in PATCHES if p.needed], ids=lambda p: p.name)
def test_a_patch_that_is_needed_cannot_be_switched_off(
    patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYLLAMA_PATCHES_OFF", f"layout,{patch.name}")
    message = f"'{patch.name}' cannot be switched off, since without it {patch.needed}; those that"
    with pytest.raises(DeviceError, match=message):
        patches._switched_off()


@pytest.fixture
def other_version(tmp_path: Path) -> str:
    """A folder in which an installed tinygrad says that it is version 0.99.0."""
    folder = tmp_path / "site"
    (folder / "tinygrad-0.99.0.dist-info").mkdir(parents=True)
    text = "Metadata-Version: 2.1\nName: tinygrad\nVersion: 0.99.0\n"
    (folder / "tinygrad-0.99.0.dist-info" / "METADATA").write_text(text)
    return str(folder)


def version_check(folder: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    code = f"""
import sys
sys.path.insert(0, {folder!r})
from tinyllama.cli.arguments import exit_code
def steps():
{"".join(f"    {line}{chr(10)}" for line in STEPS.splitlines())}
sys.exit(exit_code(steps, "train"))
"""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(**variables)
    )


def test_another_version_of_tinygrad_is_refused_in_one_line(other_version: str) -> None:
    done = version_check(other_version)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "tinygrad 0.99.0 is installed, must be 0.13.0, which our patches of it are written "
        "for: `pip install tinygrad==0.13.0`\n"
    )


def test_another_version_of_tinygrad_may_be_measured(
    other_version: str, with_all: tuple[list[float], list[str]]
) -> None:
    done = version_check(other_version, TINYLLAMA_ANY_TINYGRAD="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [*with_all]


def test_the_version_is_checked_before_patches_are_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "TINYGRAD", "0.98.0")
    device.check_tinygrad.cache_clear()
    try:
        with pytest.raises(DeviceError, match=r"tinygrad 0\.13\.0 .* must be 0\.98\.0"):
            install.__wrapped__()
    finally:
        device.check_tinygrad.cache_clear()


def test_a_missing_tinygrad_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    device.check_tinygrad.cache_clear()
    try:
        with pytest.raises(DeviceError, match=r"no tinygrad is installed, must be 0\.13\.0"):
            device.select({"DEV": "CPU"})
    finally:
        device.check_tinygrad.cache_clear()


def test_the_version_is_the_one_that_is_pinned() -> None:
    assert f'"tinygrad=={device.TINYGRAD}"' in (ROOT / "pyproject.toml").read_text()


def test_bfloat16_is_stored_as_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    compiler, sources = cpu_device().compiler, []
    compile_cached = compiler.compile_cached

    def noting(source: str) -> bytes:
        sources.append(source)
        compiled: bytes = compile_cached(source)
        return compiled

    monkeypatch.setattr(compiler, "compile_cached", noting)
    values = Tensor(np.array([1.5, -3.0, 1.00390625], np.float32)).cast(dtypes.bfloat16)
    result = (values.contiguous() * 2 + 0.3125).contiguous().realize()
    assert result.float().tolist() == [3.3125, -5.6875, 2.3125]
    text = "".join(sources)
    assert "unsigned short" in text and "__bf16" not in text


def test_a_step_runs_first_when_every_tensor_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def touch_late(memories: list[np.ndarray]) -> None:
        fills._stop_touching.wait(10)
        time.sleep(0.2)
        for memory in memories:
            memory[...] = 0

    monkeypatch.setattr(fills, "_touch", touch_late)
    total, one = Tensor.empty(1 << 20), Tensor.ones(1 << 20).contiguous().realize()
    zero_in_background([total])
    step = captured(lambda one: total.assign(total + one).realize())
    step(one)
    assert (read(total) == 1).all()


if __name__ == "__main__":
    DOCUMENT.write_text(documented(DOCUMENT.read_text()))
