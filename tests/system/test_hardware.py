"""What Linux shows of cards and drivers, before a backend is imported."""

import os
import subprocess
import sys

import pytest

from tinyllama.system import device, hardware
from tinyllama.system.hardware import may_have


@pytest.fixture
def linux(tmp_path, monkeypatch):
    """A root folder without cards, and without a libcuda that loads."""

    def refused(name):
        raise OSError(name)

    monkeypatch.setattr(hardware.sys, "platform", "linux")
    monkeypatch.setattr(hardware.ctypes, "CDLL", refused)
    (tmp_path / "dev").mkdir()
    return tmp_path


def shown(root):
    return [
        name for name in ("METAL", "CUDA", "NV", "AMD", "CL", "CPU") if may_have(name, {}, root)
    ]


def put(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_cards_only_opencl_and_the_processor_are_worth_opening(linux):
    put(linux / "sys/bus/pci/devices/0000:00:00.0/vendor", "0x8086\n")
    put(linux / "sys/bus/usb/devices/1-1/idVendor", "1d6b\n")
    assert shown(linux) == ["CL", "CPU"]


@pytest.mark.parametrize(
    ("file", "text", "backend"),
    [
        ("dev/nvidiactl", "", "NV"),
        ("sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n", "NV"),
        ("dev/kfd", "", "AMD"),
        ("sys/bus/pci/devices/0000:01:00.0/vendor", "0x1002\n", "AMD"),
    ],
)
def test_a_device_file_or_a_vendor_on_the_bus_is_a_card(linux, file, text, backend):
    put(linux / file, text)
    assert shown(linux) == [backend, "CL", "CPU"]


def test_an_amd_card_over_usb(linux):
    put(linux / "sys/bus/usb/devices/2-1/idVendor", "ADD1\n")
    put(linux / "sys/bus/usb/devices/2-1/idProduct", "0001\n")
    assert shown(linux) == ["AMD", "CL", "CPU"]


@pytest.mark.parametrize("name", ["libcuda.so.1", "libcuda.so", "usr/lib/wsl/lib/libcuda.so.1"])
def test_cuda_may_work_where_its_driver_loads(linux, name, monkeypatch):
    there = name if name.startswith("lib") else str(linux / name)

    def loads(asked):
        if asked != there:
            raise OSError(asked)

    monkeypatch.setattr(hardware.ctypes, "CDLL", loads)
    assert shown(linux) == ["CUDA", "CL", "CPU"]


@pytest.mark.parametrize("name", ["CUDA_PATH", "REMOTE", "MOCKGPU"])
def test_where_a_variable_points_elsewhere_every_backend_is_opened(linux, name):
    assert all(may_have(backend, {name: "1"}, linux) for backend in ("CUDA", "NV", "AMD"))


def test_metal_is_looked_for_on_macos_alone(monkeypatch):
    monkeypatch.setattr(hardware.sys, "platform", "darwin")
    assert all(may_have(backend, {}) for backend in ("METAL", "NV", "AMD", "CL"))


def test_a_start_on_the_processor_imports_no_backend_of_cards():
    if any(may_have(name, {}) for name in ("CUDA", "NV", "AMD")) or sys.platform != "linux":
        pytest.skip("this machine may have a card")
    code = (
        "import sys; from tinyllama.system import device; print(device.select().device,"
        " *(n for n in ('nv', 'amd', 'cuda') if f'tinygrad.runtime.ops_{n}' in sys.modules))"
    )
    chosen = {"DEV", "GPU", *device.FLAGS, *hardware._ELSEWHERE}
    environ = {name: value for name, value in os.environ.items() if name not in chosen}
    done = subprocess.run([sys.executable, "-c", code], env=environ, text=True, capture_output=True)
    selected, *imported = done.stdout.split()
    assert selected in ("CPU", "CL"), done.stderr  # OpenCL may drive a GPU here
    assert imported == []
