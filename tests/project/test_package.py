"""The package that `pip install .` makes: what is in it, and that importing it is quick."""

import shutil
import subprocess
import sys
import time
import zipfile

import pytest
from runs_helpers import ROOT, environment


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that the tree stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "tinyllama", source / "tinyllama")
    out = tmp_path_factory.mktemp("wheel")
    words = ["wheel", ".", "--no-deps", "--quiet", "--wheel-dir", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_holds_every_source_file(wheel):
    found = {name for name in wheel.namelist() if name.startswith("tinyllama/")}
    suffixes = (".py", ".c", ".h")
    package = ROOT / "tinyllama"
    expected = {str(p.relative_to(ROOT)) for p in package.rglob("*") if p.suffix in suffixes}
    assert expected | {"tinyllama/py.typed"} == found
    assert "tinyllama/ops/cpu/gemm.c" in found


def test_the_wheel_has_its_name_its_console_script_and_its_licence(wheel):
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert info.startswith("tinyllama_trainer-")
    scripts = wheel.read(f"{info}/entry_points.txt").decode()
    assert scripts.split("\n")[:2] == ["[console_scripts]", "tinyllama = tinyllama.cli.app:program"]
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "Name: tinyllama-trainer\n" in metadata
    assert "Requires-Dist: tinygrad==0.13.0\n" in metadata
    assert any(name.endswith("LICENSE") for name in wheel.namelist())


def imported(code):
    words = [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "code",
    [
        "import tinyllama",
        "import tinyllama.cli.app",
        "import tinyllama.system.device",
        "import tinyllama.config",
        "import tinyllama.train.checkpoint",
        "import tinyllama.data.batches",
        "import tinyllama.tokenizers.sentencepiece",
    ],
)
def test_importing_what_needs_no_device_does_not_import_tinygrad(code):
    assert "tinygrad" not in imported(code)


def test_the_model_is_there_when_it_is_asked_for():
    assert "tinygrad" in imported("from tinyllama import Llama, LlamaConfig; Llama.from_pretrained")


def test_importing_is_quick():
    def seconds():
        words = [sys.executable, "-c", "import tinyllama.cli.app"]
        begun = time.process_time(), time.perf_counter()
        subprocess.run(words, check=True, env=environment())
        return time.perf_counter() - begun[1]

    assert min(seconds() for _ in range(3)) < 1.0
