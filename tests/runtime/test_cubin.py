"""CUDA texts become machine code for the card, by the NVRTC that is installed; no card is needed.

The driver is a fake (helpers/fake_cuda.c) that takes no PTX and notes what is started.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from fake_cuda import needs_nvrtc, starts, variables
from runs_helpers import ROOT, config_file, environment, printed, printed_json, run_command

from tinyllama.runtime.cubin import FRAME_BYTES, REGISTERS, attributes, shared_bytes, spilled_bytes
from tinyllama.system import device, nvrtc

pytestmark = needs_nvrtc

ADD = """
import sys
from tinyllama.system import device
from tinyllama.runtime.patches import install
print(device.select().line())
install()
from tinygrad import Tensor, dtypes
Tensor.ones(64, dtype=dtypes.bfloat16).contiguous().realize()
"""
# Three steps of a small model; what is in the log before the second and after the third.
STEPS = f"""
import json, os, sys
from tinyllama.system import device
device.select()
sys.path[:0] = [{str(ROOT / "tests/helpers")!r}]
from model_helpers import SQUARE, build, random_batch
from tinyllama.config import TrainingConfig
from tinyllama.runtime.capture import kernel_count
from tinyllama.train.optimizer import AdamW
from tinyllama.train.step import TrainStep

model = build(SQUARE)
optimizer = AdamW(model.state_dict(), TrainingConfig())
step = TrainStep(model, optimizer, 1)
places = []
for n in range(3):
    step([random_batch(SQUARE, seed=n)], n + 1, 0.01)
    places.append(len(open(os.environ["FAKE_CUDA_LOG"]).readlines()))
print(json.dumps([places, kernel_count(step._whole)]))
"""


def test_a_card_gets_machine_code(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert printed("-c", ADD, DEV="CUDA", **variables(log)).startswith(
        "backend CUDA, Fake card, sm_90, NVRTC "
    )
    assert starts(log)["kernel"] == 2  # the trial, and one of tinygrad's own


def test_the_patch_can_be_switched_off_and_then_a_driver_gets_ptx(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ADD],
        capture_output=True,
        text=True,
        env=environment(
            DEV="CUDA", TINYLLAMA_PATCHES_OFF="cubin", CCACHE="0", **variables(tmp_path / "log")
        ),
    )
    assert done.returncode == 1
    assert "module load failed with status code 222" in done.stderr


def test_a_captured_step_is_started_as_a_few_graphs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    places, kernels = printed_json("-c", STEPS, DEV="CUDA", **variables(log))
    first, later = log.read_text().splitlines()[: places[0]], log.read_text().splitlines()
    nodes = [line.split() for line in first if line.startswith("node")]
    assert len(nodes) == kernels
    assert {node[4] for node in nodes} == {"0"}  # no memory that a captured step would forget
    later = later[places[0] : places[2]]
    # "update" puts the addresses of the inputs into a graph before it is started.
    assert {line.split()[0] for line in later} == {"graph", "update"}
    later = [line for line in later if line.startswith("graph")]
    assert sum(int(line.split()[1]) for line in later) == 2 * kernels
    assert len(later) <= 2 * 4


def test_a_driver_that_is_too_old_is_named_with_what_helps(tmp_path: Path) -> None:
    words = ["train", config_file(tmp_path / "run")]
    old = variables(tmp_path / "log", FAKE_CUDA_VERSION="12040")
    code, _, errors = run_command(*words, CUDA="1", **old)
    assert code == 2
    assert "CUDA=1: CUDA is not available (the driver, which is for CUDA 12.4, does not" in errors
    assert len(errors.splitlines()) == 1


def test_the_backends_command_says_which_nvrtc_compiles(tmp_path: Path) -> None:
    code, out, errors = run_command("backends", **variables(tmp_path / "log"))
    assert (code, errors) == (0, "")
    found = device.nvrtc_library()
    assert found is not None
    (line,) = [line for line in out.splitlines() if line.startswith("CUDA ")]
    assert line == f"CUDA    Fake card, sm_90, {found.line()} (renderer CUDA)"


NAMED = """
import os
from tinyllama.system import device
before = os.environ.get("NVRTC_PATH")
print(device.select().line())
print(os.environ.get("NVRTC_PATH") == before)
"""


def test_the_nvrtc_that_was_found_is_not_left_as_the_users_choice(tmp_path: Path) -> None:
    """A process that is started later would take it for that."""
    given = variables(tmp_path / "log", DEV="CUDA")
    found = device.nvrtc_library()
    assert found is not None
    assert printed("-c", NAMED, **given, NVRTC_PATH="").endswith("\nTrue\n")
    line, kept = printed("-c", NAMED, **given, NVRTC_PATH=found.path).splitlines()
    assert " of NVRTC_PATH, " in line
    assert kept == "True"


def test_a_missing_nvrtc_is_one_line_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import importlib.util, sys
from tinyllama.system import nvrtc, device
nvrtc._candidates = lambda *_: iter(())
try:
    device.select()
except device.DeviceError as error:
    print(error)
"""
    for variable, begins in (
        ("CUDA", "CUDA=1: CUDA is not available (the card and its driver are here; it needs NVRTC"),
        ("GPU", "GPU=1: the card's CUDA does not work (the card and its driver are here; it needs"),
    ):
        text = printed("-c", code, **variables(tmp_path / "log", **{variable: "1"}))
        assert text.startswith(begins)
        assert "`pip install 'tinyllama-trainer[cuda]'`" in text
        assert len(text.splitlines()) == 1


def fake_library(folder: Path, version: str) -> Path:
    """A library that says that it is NVRTC of a version, as 12.4."""
    folder.mkdir(parents=True)
    source, library = folder / "nvrtc.c", folder / f"libnvrtc.so.{version.split('.')[0]}"
    major, minor = version.split(".")
    source.write_text(
        f"int nvrtcVersion(int *a, int *b) {{ *a = {major}; *b = {minor}; return 0; }}"
    )
    subprocess.run(["clang", "-shared", "-o", str(library), str(source)], check=True)
    return library


def test_nvrtc_is_looked_for_in_packages_then_in_the_toolkit_then_in_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(named: str = "") -> tuple[str, tuple[int, int]]:
        library = nvrtc.find(named, [tmp_path / "cuda"])
        assert library is not None
        return library.origin, library.version

    packages = tmp_path / "site" / "nvidia"
    named = str(fake_library(tmp_path / "own", "11.8"))
    fake_library(packages / "cu13" / "lib", "13.1")
    fake_library(packages / "cuda_nvrtc" / "lib", "12.6")
    fake_library(tmp_path / "cuda" / "lib64", "12.4")
    system = str(fake_library(tmp_path / "system", "12.2"))
    spec = type("Spec", (), {"submodule_search_locations": [str(packages)]})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: system)
    assert found(named) == ("NVRTC_PATH", (11, 8))
    assert found() == ("the package nvidia-cuda-nvrtc", (13, 1))  # the newest
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert found() == ("the CUDA toolkit", (12, 4))
    (tmp_path / "cuda" / "lib64" / "libnvrtc.so.12").unlink()
    (tmp_path / "cuda" / "lib64" / "libnvrtc.so.11").write_text("damaged")
    assert found() == ("the system", (12, 2))
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    assert nvrtc.find("", [tmp_path / "cuda"]) is None


def test_a_cubin_says_what_its_kernel_takes() -> None:
    found = device.nvrtc_library()
    assert found is not None
    text = """
extern "C" __global__ void k(float *x, int n) {
  __shared__ float tile[512];
  float held[64];
  for (int i = 0; i < 64; i++) held[i * n % 64] = x[i];
  tile[threadIdx.x] = held[n % 64];
  __syncthreads();
  x[threadIdx.x] = tile[511 - threadIdx.x];
}"""
    cubin = found.compile(text, found.options("sm_80"))
    assert shared_bytes(cubin) == 2048
    assert spilled_bytes(cubin) == attributes(cubin)[FRAME_BYTES] == 256  # held
    assert 0 < attributes(cubin)[REGISTERS] < 256


def test_what_nvrtc_refuses_is_said() -> None:
    found = device.nvrtc_library()
    assert found is not None
    with pytest.raises(nvrtc.CompileFailed, match='identifier "wrong" is undefined'):
        found.compile("int f() { return wrong; }", found.options("sm_90"))
    with pytest.raises(nvrtc.CompileFailed, match="invalid value for --gpu-architecture"):
        found.compile("", found.options("sm_1"))
