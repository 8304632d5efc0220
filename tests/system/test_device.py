"""Which device runs: what the environment asks for, what is refused, what the first line says."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from runs_helpers import configuration, environment, metrics, run_command, train, trainer
from tinygrad.device import Device
from tinygrad.helpers import Context

from tinyllama.errors import DeviceError
from tinyllama.ops import forms
from tinyllama.runtime import kernel
from tinyllama.system import device, memory


@pytest.fixture(autouse=True)
def on_the_processor():
    """What a test chooses ends with it."""
    with Context(DEV="CPU"):
        yield


def without_cards():
    """Skip where a card answers: these tests are about its absence."""
    if os.uname().sysname != "Linux" or any(
        os.path.exists(p) for p in ("/dev/nvidia0", "/dev/kfd")
    ):
        pytest.skip("a GPU may answer here")


@pytest.mark.parametrize(
    ("environ", "first", "reason"),
    [
        ({"DEV": "CL"}, "CL", "DEV=CL"),
        ({"DEV": "CPU:LLVM"}, "CPU:LLVM", "DEV=CPU:LLVM"),
        ({"CPU": "1"}, "CPU", "CPU=1"),
        ({"CL": "1"}, "CL", "CL=1"),
        ({"METAL": "1", "CUDA": "0"}, "METAL", "METAL=1"),
        ({"CUDA": "1", "DEV": "CUDA"}, "CUDA", "DEV=CUDA"),
        ({"CPU": "1", "DEV": "CPU:X86"}, "CPU:X86", "DEV=CPU:X86"),
        ({"GPU": "1"}, "METAL", "GPU=1: the fastest available"),
        ({}, "METAL", "none requested: the fastest available"),
    ],
)
def test_each_variable_asks_for_a_device(environ, first, reason):
    candidates, why = device.requested(environ)
    assert (candidates[0], why) == (first, reason)
    assert ("CPU" in candidates) == (environ in ({}, {"CPU": "1"}))


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"DEV": "CPU", "CL": "1"}, "DEV=CPU and CL=1 contradict each other: set one of them"),
        ({"DEV": "CPU", "GPU": "1"}, "DEV=CPU and GPU=1 contradict each other: set one of them"),
        ({"CPU": "1", "CL": "1"}, "CPU=1 and CL=1 contradict each other: set one of them"),
        ({"GPU": "1", "CPU": "1"}, "CPU=1 and GPU=1 contradict each other: set one of them"),
    ],
)
def test_contradictions_are_refused(environ, message):
    with pytest.raises(DeviceError) as refused:
        device.select(dict(environ))
    assert str(refused.value) == message


@pytest.mark.parametrize("name", ["METAL", "CUDA"])
@pytest.mark.parametrize("way", ["flag", "DEV"])
def test_an_absent_device_says_what_is_there_and_what_to_install(name, way):
    without_cards()
    environ = {name: "1"} if way == "flag" else {"DEV": name}
    with pytest.raises(DeviceError) as refused:
        device.select(environ)
    message = str(refused.value)
    assert message.startswith(f"{name}=1: " if way == "flag" else f"DEV={name}: ")
    assert f"{name} is not available (" in message
    assert "Available here: " in message and "CPU" in message.partition("Available here: ")[2]
    assert message.endswith(f"To use it, install {device.INSTALL[name]}")
    assert "DEV" not in environ  # nothing was chosen instead


def test_looking_for_devices_changes_nothing():
    assert "CPU" in [choice.device for choice in device.available()]
    assert device._open("NULL", "a test").device == "NULL"
    assert Device.DEFAULT == "CPU"


def test_a_backend_that_does_not_exist_is_refused():
    with pytest.raises(DeviceError, match="there is no backend called 'CPUU'"):
        device.select({"DEV": "CPUU"})


@pytest.mark.parametrize("target", ["CPU:NONE", "CL:1", "CPU:LLVM"])
def test_a_renderer_that_does_not_work_is_not_taken_for_a_missing_device(target, monkeypatch):
    def refuse(name):
        raise RuntimeError("src:1: error")

    if target == "CPU:LLVM":  # with some versions of LLVM it works
        monkeypatch.setattr(device, "_compute", refuse)
        device._open.cache_clear()
    with pytest.raises(DeviceError) as refused:
        device.select({"DEV": target})
    name = target.partition(":")[0]
    message = str(refused.value)
    assert message.startswith(f"DEV={target}: {target} does not work (")
    assert message.endswith(f"DEV={name} takes what {name} offers by itself")
    device._open.cache_clear()


def test_a_renderer_that_is_named_computes_before_it_is_taken(monkeypatch):
    computed = []
    monkeypatch.setattr(device, "_compute", computed.append)
    device._open.cache_clear()
    assert device.select({"DEV": "CPU:CLANGJIT"}).reason == "DEV=CPU:CLANGJIT"
    assert computed == ["CPU"]
    device._open.cache_clear()


@pytest.mark.parametrize("name", device.TRIED)
def test_a_card_whose_driver_does_not_take_what_is_compiled_does_not_answer(name, monkeypatch):
    def refuse(name):
        raise RuntimeError("module load failed with status code 222")

    opened = {name: SimpleNamespace(renderer=None, cu_device=None)}
    monkeypatch.setattr("tinygrad.device.Device", opened)
    monkeypatch.setattr(device, "_compute", refuse)
    device._open.cache_clear()
    with pytest.raises(DeviceError, match="module load failed with status code 222"):
        device._open(name, "a test")
    device._open.cache_clear()


def test_the_trial_notices_a_wrong_result(monkeypatch):
    device._compute("CPU")
    monkeypatch.setattr("tinygrad.Tensor.sum", lambda self: self[0])
    with pytest.raises(RuntimeError, match=r"computes wrong results: 0\.0 instead of 4032"):
        device._compute("CPU")


def test_nothing_is_trained_on_a_device_that_only_compiles(tmp_path):
    (file := tmp_path / "tiny.toml").write_text(f"[data]\ntrain_path = '{__file__}'\n")
    code, out, err = run_command("train", file, DEV="NULL")
    assert (code, out) == (2, "")
    assert err.startswith("DEV=NULL: NULL compiles kernels and runs none")


def test_selecting_sets_dev_for_children_and_removes_what_tinygrad_refuses():
    environ = {"CPU": "1", "METAL": "0", "OTHER": "1"}
    choice = device.select(environ)
    assert environ == {"DEV": "CPU", "OTHER": "1"}
    assert Device.DEFAULT == "CPU"
    assert (choice.device, choice.renderer, choice.reason) == ("CPU", "ClangJIT", "CPU=1")


def test_a_gpu_that_is_absent_is_not_replaced_by_the_processor(monkeypatch):
    def refuse(target, reason):
        if target == "CPU":
            return device.DeviceChoice("CPU", "ClangJIT", "a processor", reason)
        raise DeviceError("not here")

    monkeypatch.setattr(device, "_open", refuse)
    with pytest.raises(DeviceError) as refused:
        device.select({"GPU": "1"})
    assert str(refused.value) == (
        "GPU=1: no GPU works here (tried METAL, CUDA, NV, AMD, CL). Available: CPU. A GPU needs "
        f"{device.INSTALL['CUDA']}; an AMD card with the amdgpu "
        "driver (/dev/kfd); or its own OpenCL driver"
    )
    assert device.select({}).device == "CPU"


def test_without_any_device_the_missing_compiler_is_named(monkeypatch):
    def refuse(target, reason):
        raise DeviceError(f"no {target} here")

    monkeypatch.setattr(device, "_open", refuse)
    with pytest.raises(DeviceError) as refused:
        device.select({})
    assert str(refused.value) == f"CPU: no CPU here; to use it, install {device.INSTALL['CPU']}"


def test_a_wrong_number_of_threads_is_refused_before_a_device_is_opened(monkeypatch):
    monkeypatch.setattr(device, "_open", lambda *_: pytest.fail("opened"))
    with pytest.raises(DeviceError, match="NUM_CPU_THREADS: got 'x', must be an integer of 1 or"):
        device.select({"NUM_CPU_THREADS": "x"})


def test_opencl_on_a_processor_is_selected_by_its_name_alone(monkeypatch):
    def answer(target, reason):
        if target in ("CL", "CPU"):
            return device.DeviceChoice(target, "any", "a processor", reason, target == "CL")
        raise DeviceError("not here")

    monkeypatch.setattr(device, "_open", answer)
    with pytest.raises(DeviceError) as refused:
        device.select({"GPU": "1"})
    message = str(refused.value)
    assert "Available: CL, CPU (CL is OpenCL on the processor; to use it, set CL=1)." in message
    choice = device.select({"CL": "1"})
    assert (choice.device, choice.reason) == ("CL", "CL=1")
    assert device.select({"DEV": "CL"}).device == "CL"
    assert device.select({}).device == "CPU"


def test_gpu_takes_a_card_that_opencl_drives(monkeypatch):
    def answer(target, reason):
        if target == "CL":
            return device.DeviceChoice(target, "any", "a card", reason)
        raise DeviceError("not here")

    monkeypatch.setattr(device, "_open", answer)
    assert (device.select({"GPU": "1"}).device, device.select({}).device) == ("CL", "CL")
    assert device.select({"GPU": "1"}).reason == "GPU=1: the fastest available"


def test_pocl_is_known_as_a_processor():
    choices = {choice.device: choice for choice in device.available()}
    if "CL" not in choices:
        pytest.skip("no OpenCL here")
    without_cards()
    assert choices["CL"].is_opencl_processor and not choices["CPU"].is_opencl_processor


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    device._open.cache_clear()
    with pytest.raises(DeviceError, match=r"the C compiler 'no-such-compiler' is not installed"):
        device.select({"DEV": "CPU"})
    device._open.cache_clear()


@pytest.mark.parametrize("named", ["gcc", "clang"])
def test_a_compiler_that_is_no_clang_is_refused(named, monkeypatch):
    if shutil.which(named) is None:
        pytest.skip(f"no {named} here")
    version = subprocess.run([named, "--version"], capture_output=True, text=True).stdout
    if named == "gcc" and "clang" in version:
        pytest.skip("gcc is another name of clang here, as on macOS")
    monkeypatch.setenv("CC", named)
    device._open.cache_clear()
    if named == "clang":
        assert device.select({"DEV": "CPU"}).device == "CPU"
    else:
        with pytest.raises(DeviceError, match="CC=gcc is not clang, which our kernels need"):
            device.select({"DEV": "CPU"})
    device._open.cache_clear()


def test_training_on_an_absent_device_ends_with_exit_code_2(tmp_path):
    without_cards()
    file = tmp_path / "tiny.toml"
    file.write_text(f"[data]\ntrain_path = '{__file__}'\n")
    code, out, err = run_command("train", file, METAL="1")
    assert (code, out) == (2, "")
    assert err.startswith("METAL=1: METAL is not available (") and len(err.splitlines()) == 1


def test_the_backends_command_lists_what_answers_and_what_others_need():
    code, out, err = run_command("backends")
    assert (code, err) == (0, "")
    assert any(
        line.startswith("CPU     ") and "(renderer ClangJIT)" in line for line in out.splitlines()
    )
    without_cards()
    assert f"METAL   not available; needs {device.INSTALL['METAL']}" in out


@pytest.mark.parametrize("way", ["--threads", "NUM_CPU_THREADS"])
def test_the_number_of_threads_is_printed_and_used(tmp_path, way):
    code = f"""
import sys
from tinyllama.system import device
choice = device.select({"threads=3" if way == "--threads" else ""})
from tinygrad import Tensor
from tinyllama.ops.matmul import linear
from tinyllama.ops import forms
from tinyllama.runtime import c_kernel
print(choice.line())
print(c_kernel.per_thread(5).shape[0])
x = Tensor.ones(8, 4).contiguous().realize()
print(linear(x, x).sum().item())
"""
    variables = {} if way == "--threads" else {"NUM_CPU_THREADS": "3"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(**variables)
    )
    assert found.returncode == 0, found.stderr
    line, rows, total = found.stdout.splitlines()
    assert ", 3 threads, " in line
    assert (rows, total) == ("3", "256.0")


@pytest.mark.parametrize("value", ["0", "all", "-1"])
def test_a_value_that_is_no_number_of_threads_is_refused(monkeypatch, value):
    monkeypatch.setenv("NUM_CPU_THREADS", value)
    message = f"NUM_CPU_THREADS: got '{value}', must be an integer of 1 or more"
    with pytest.raises(DeviceError, match=message):
        device.threads()


def test_kernels_can_be_switched_off(tmp_path, monkeypatch):
    config = configuration(tmp_path / "on", "training.max_steps=3", "model.num_layers=1")
    weight = trainer(config).model.head_weight()
    assert forms.chosen(weight) == "cpu"
    train(config)
    monkeypatch.setenv("TINYLLAMA_KERNELS", "0")
    assert forms.chosen(weight) == "portable"
    monkeypatch.setattr(kernel, "run", None)  # no kernel is made
    train(configuration(tmp_path / "off", "training.max_steps=3", "model.num_layers=1"))
    on, off = metrics(tmp_path / "on"), metrics(tmp_path / "off")
    for step in (1, 2, 3):
        assert on[step]["loss"] == pytest.approx(off[step]["loss"], rel=1e-5)
        assert on[step]["grad_norm"] == pytest.approx(off[step]["grad_norm"], rel=1e-4)


def test_memory_in_use_is_that_of_this_process():
    before = memory.memory_in_use_bytes()
    held = b"x" * (64 << 20)
    assert memory.memory_in_use_bytes() - before > 60 << 20
    assert memory.resident_bytes(peak=True) >= memory.resident_bytes() > len(held)


@pytest.mark.parametrize("kernels", ["1", "0"])
def test_a_step_that_is_collected_on_a_kernel_thread_does_not_wait_for_itself(kernels):
    """Neither ours (runtime/threads.py) nor tinygrad's own, which runs without our kernels."""
    script = """
import gc, time, weakref
from tinyllama.system import device
device.select()
from tinygrad import Tensor
from tinygrad.device import Device
from tinygrad.engine.jit import GraphRunner
from tinyllama.runtime.capture import captured

def step(x):
    return ((x + 1).contiguous() * 2).contiguous().realize()

gc.disable()
x = Tensor([1.0, 2.0]).realize()
first, second = captured(step), captured(step)
for jit in (first, second):
    print(jit(x).tolist())
(graph, _) = [weakref.ref(o) for o in gc.get_objects() if isinstance(o, GraphRunner)]
ring = [first]
ring.append(ring)  # garbage that only the collector finds
del first, jit, ring
assert graph() is not None

def collect(thread):
    time.sleep(0.3)
    gc.collect()

Device["CPU"].tasks.put([collect, 1, 0])
print(second(x).tolist())
Device["CPU"].synchronize()
for _ in range(100):
    time.sleep(0.02 * (graph() is not None))
print(graph())
"""
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment(TINYLLAMA_KERNELS=kernels),
        timeout=60,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == ["[4.0, 6.0]"] * 3 + ["None"]
