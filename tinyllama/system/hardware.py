"""Whether Linux shows what a backend needs, found in a millisecond.

tinygrad finds that out by importing the backend: 0.2 s of every start on a machine without a card.
"""

import ctypes
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

_NVIDIA, _AMD = "0x10de", "0x1002"  # vendors, as PCI numbers them
_AMD_OVER_USB = ("add1", "0001")  # vendor and product of the adapter that tinygrad can drive
# These name a library or a machine with cards to tinygrad, which then looks by itself.
_ELSEWHERE = ("CUDA_PATH", "REMOTE", "MOCKGPU")


def may_have(backend: str, environ: Mapping[str, str], root: Path = Path("/")) -> bool:
    """False where a backend cannot work for lack of a card or a driver; True where only opening it
    tells. `root` is the folder with dev and sys."""
    if backend == "METAL":
        return sys.platform == "darwin"
    if sys.platform != "linux" or any(environ.get(name) for name in _ELSEWHERE):
        return True
    look = _LOOKS.get(backend)
    return look is None or look(root)


def _cuda(root: Path) -> bool:
    for name in ("libcuda.so.1", "libcuda.so", str(root / "usr/lib/wsl/lib/libcuda.so.1")):
        with suppress(OSError):
            ctypes.CDLL(name)
            return True
    return False


def _nv(root: Path) -> bool:
    return (root / "dev/nvidiactl").exists() or _NVIDIA in _pci_vendors(root)


def _amd(root: Path) -> bool:
    usb = root / "sys/bus/usb/devices"
    adapters = (
        (_text(device / "idVendor"), _text(device / "idProduct")) for device in usb.glob("*")
    )
    return (root / "dev/kfd").exists() or _AMD in _pci_vendors(root) or _AMD_OVER_USB in adapters


_LOOKS: dict[str, Callable[[Path], bool]] = {"CUDA": _cuda, "NV": _nv, "AMD": _amd}


def _pci_vendors(root: Path) -> Iterable[str]:
    return map(_text, (root / "sys/bus/pci/devices").glob("*/vendor"))


def _text(file: Path) -> str:
    try:
        return file.read_text().strip().lower()
    except OSError:
        return ""
