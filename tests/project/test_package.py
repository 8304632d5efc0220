"""Wheel, source distribution and editable install: what they hold; and quick imports."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import tomllib
import zipfile

import pytest
from runs_helpers import ROOT, environment

from tinyllama import __version__

LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv*", ".cache", ".demo", ".*_cache", ".hypothesis", ".coverage*", "__pycache__",
    "*.egg-info", "build", "checkpoints", "mutants",
)  # fmt: skip
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.toml"))


def run(*words, **options):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the repository, so that building leaves it clean."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tree", ignore=LEFT_OUT)


@pytest.fixture(scope="module")
def build_tools(tmp_path_factory):
    """The environment of a build: setuptools, and no package of this repository."""
    folder = tmp_path_factory.mktemp("build_tools")
    words = ["install", "--quiet", "--target", folder, "setuptools>=68", "wheel"]
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *words)
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def sdist(source, build_tools, tmp_path_factory):
    """The source distribution, unpacked."""
    out = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    run(sys.executable, "-c", code, cwd=source, env=build_tools)
    (file,) = out.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not in 3.11.2
        archive.extractall(out, **safe)
    return out / file.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, build_tools, tmp_path_factory):
    """The wheel, built from the source distribution alone."""
    out = tmp_path_factory.mktemp("wheel")
    words = ["wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", out]
    run(sys.executable, "-m", "pip", *words, cwd=sdist, env=build_tools)
    (file,) = out.glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_holds_every_source_file_and_the_configurations(wheel):
    found = {name for name in wheel.namelist() if name.startswith("tinyllama/")}
    files = [path for path in (ROOT / "tinyllama").rglob("*") if path.is_file()]
    expected = {str(p.relative_to(ROOT)) for p in files if p.parent.name != "__pycache__"}
    expected |= {f"tinyllama/configs/{name}" for name in CONFIGS}
    assert expected == found
    assert "tinyllama/ops/cpu/gemm.c" in found and "tinyllama/configs/124m.toml" in found


def test_the_source_distribution_holds_tools_configurations_and_tests(sdist):
    for folder, pattern in (("tools", "*"), ("configs", "*.toml"), ("tests", "**/*.py")):
        expected = {
            path.relative_to(ROOT)
            for path in (ROOT / folder).glob(pattern)
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert len(expected) >= 3
        assert {path for path in expected if not (sdist / path).is_file()} == set()
    for name in ("tests/conftest.py", "tests/slow.txt", "Makefile", "README.md", "LICENSE"):
        assert (sdist / name).is_file()


def check_commands(program, folder, **variables):
    """An installed package finds its configurations by name, away from the repository."""
    found = json.loads(run(*program, "params", "124m", "--json", cwd=folder, env=variables))
    assert found["total"] == 162_417_408
    assert run(*program, "--version", cwd=folder, env=variables) == f"tinyllama {__version__}\n"
    missing = subprocess.run(
        [*program, "params", "125m"], cwd=folder, env=variables, capture_output=True, text=True
    )
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr == "125m: no such file; configurations by name: 124m, 7b, demo or lora\n"


def test_an_installed_wheel_finds_its_configurations_by_name(wheel, tmp_path):
    wheel.extractall(tmp_path / "installed")
    path = os.pathsep.join([str(tmp_path / "installed"), sysconfig.get_path("purelib")])
    program = [sys.executable, "-P", "-m", "tinyllama"]
    check_commands(program, tmp_path, **os.environ | {"PYTHONPATH": path})


def test_an_editable_install_finds_the_configurations_of_the_source_tree(
    source, build_tools, tmp_path
):
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    words = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", source]
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python"]
    run(*pip, *words, env=build_tools)
    # What tinyllama needs comes from here, after the new environment's own packages.
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "needed.pth").write_text(sysconfig.get_path("purelib"))
    packages = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    check_commands([str(venv / "bin" / "tinyllama")], tmp_path, **packages)
    config = source / "configs" / "tiny.toml"
    config.write_text("[model]\nnum_layers = 1\n")
    found = run(venv / "bin" / "tinyllama", "params", "tiny", "--json", cwd=tmp_path, env=packages)
    assert json.loads(found)["parts"]["attention"] == 4 * 768**2
    config.unlink()


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


def test_using_the_model_imports_tinygrad():
    assert "tinygrad" in imported("from tinyllama import Llama, LlamaConfig; Llama.from_pretrained")


HEAVY = {
    "tinygrad",
    "numpy",
    "msgspec",
    "tomli",
    "sentencepiece",
    "tokenizers",
    "tqdm",
    "matplotlib",
}


def test_the_command_line_starts_without_what_a_command_alone_needs():
    assert HEAVY & imported("import tinyllama.cli.app") == set()
    helped = "import sys\nfrom tinyllama.cli.app import main\ntry: main(['train', '--help'])\n"
    assert HEAVY & imported(f"{helped}except SystemExit: pass\nprint(end='')") == set()


@pytest.mark.parametrize(
    "words",
    [
        ["train", "124m", "--set", "data.train_path='nowhere.txt'"],
        ["train", "FILE", "--set", "data.train_path='FILE'", "--resume"],
        ["train", "124m", "--set", "data.train_path='FILE'", "--resume", "nowhere"],
        ["evaluate", "--model", "nowhere/a/b", "--data", "FILE"],
        ["generate", "--model", "nowhere/a/b"],
        ["export", "nowhere/a/b", "out"],
        ["report", "nowhere"],
        ["analyze", "nowhere"],
    ],
    ids=" ".join,
)
def test_what_is_wrong_with_files_is_said_before_a_device_is_opened(words, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(f"[checkpointing]\ncheckpoint_dir = '{tmp_path}/run'\n")
    words = [word.replace("FILE", str(file)) for word in words]
    code = (
        "import sys, os\nfrom tinyllama.cli.app import main\n"
        f"os.environ['HF_HUB_OFFLINE'] = '1'\ntry: main({words!r})\n"
        "except SystemExit as ended: assert ended.code == 2\nprint(end='')"
    )
    assert "tinygrad" not in imported(code)


def test_importing_is_quick():
    def seconds():
        words = [sys.executable, "-c", "import tinyllama.cli.app"]
        begun = time.process_time(), time.perf_counter()
        subprocess.run(words, check=True, env=environment())
        return time.perf_counter() - begun[1]

    assert min(seconds() for _ in range(3)) < 1.0


def test_the_extra_all_is_every_extra_but_those_of_developers():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {
        name: {word for one in needed for word in extras_of(one)}
        for name, needed in project["optional-dependencies"].items()
    }
    for_developers = {"bench", "conformance", "dev", "fuzz", "mutants", "quality"}
    for_developers |= {"lm-eval"}  # 65 packages, in an environment of its own (make lm-eval)
    reached, waiting = set(), ["all"]
    while waiting:
        waiting += extras[name := waiting.pop()] - reached
        reached.add(name)
    assert reached == set(extras) - for_developers
    documented = "cuda hub serve parquet observe otel trackers".split()
    assert set(documented) <= extras["all"]


def extras_of(requirement: str) -> list[str]:
    """The extras of this package that a requirement names."""
    found = re.fullmatch(r"tinyllama-trainer\[([a-z,-]+)\]", requirement)
    return found[1].split(",") if found else []
