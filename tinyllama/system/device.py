"""Which device a run uses, selected once, before tinygrad is imported, and printed.

tinygrad 0.13 reads `DEV=CPU`, `DEV=CL`, ...; it ignores `GPU=1` and refuses `CPU=1`. Here all of
`DEV=...`, `GPU=1`, `CPU=1`, `METAL=1`, `CUDA=1`, `CL=1` work. A requested device that is absent is
an error that lists what is available; nothing falls back silently. OpenCL on the processor (pocl)
is no GPU: only `CL=1` or `DEV=CL` selects it. This is the only module that reads the environment.
"""

import functools
import os
import shutil
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path

from tinyllama.errors import DeviceError
from tinyllama.system import nvrtc, processor
from tinyllama.system.bindings import bind_nvrtc, defer_llvm
from tinyllama.system.gpu_driver import cuda_name, opencl_is_processor, try_cuda
from tinyllama.system.hardware import may_have

# What GPU=1 tries, in this order.
GPU_ORDER = ("METAL", "CUDA", "NV", "AMD", "CL")
FLAGS = ("CPU", "METAL", "CUDA", "NV", "AMD", "CL", "WEBGPU", "QCOM", "NULL")
# Their compiler (NVRTC) is installed apart from the driver, which may be too old for it: only a
# computation shows that.
TRIED = ("CUDA", "NV")
# What to install for each backend.
INSTALL = {
    "CPU": "a C compiler: `apt-get install clang` (Debian), `xcode-select --install` (macOS)",
    "METAL": "macOS on Apple Silicon",
    "CUDA": f"an NVIDIA driver, and {nvrtc.INSTALL}",
    "NV": "an NVIDIA card whose driver files /dev/nvidia* are open to you",
    "AMD": "an AMD card with the amdgpu driver (/dev/kfd)",
    "CL": "an OpenCL driver: your card's own, or for the processor"
    " `apt-get install pocl-opencl-icd ocl-icd-libopencl1`",
    "WEBGPU": "the dawn library (libwebgpu_dawn)",
    "QCOM": "a Qualcomm Adreno GPU (/dev/kgsl-3d0)",
}

# The version that runtime/patches/ is written for, as pyproject.toml pins it.
TINYGRAD = "0.13.0"
DEFERRED_LLVM = "deferred_llvm"  # the patch that acts before a device is imported


@dataclass(frozen=True)
class DeviceChoice:
    """A device that works: tinygrad's name, what renders its kernels, and why it was selected."""

    device: str
    renderer: str
    description: str
    reason: str
    is_opencl_processor: bool = False  # OpenCL that computes on the processor, as pocl does

    def line(self) -> str:
        """The first line a run prints."""
        return (
            f"backend {self.device}, {self.description}, renderer {self.renderer} ({self.reason})"
        )


def variable(name: str) -> str | None:
    """A setting of another program in the environment; None where it is not set, or empty."""
    return os.environ.get(name) or None


def requested(environ: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    """Candidates in order of preference, and the reason for them, from the environment.

    Raises DeviceError when two variables contradict each other.
    """
    flags = [name for name in (*FLAGS, "GPU") if environ.get(name, "") not in ("", "0")]
    target = environ.get("DEV", "")
    if target and not flags:
        return (target,), f"DEV={target}"
    if target and [target.partition(":")[0].upper()] != flags:
        raise DeviceError(f"DEV={target} and {flags[0]}=1 contradict each other: set one of them")
    if len(flags) > 1:
        both = " and ".join(f"{name}=1" for name in flags)
        raise DeviceError(f"{both} contradict each other: set one of them")
    if flags == ["GPU"]:
        return GPU_ORDER, "GPU=1: the fastest available"
    if flags:
        return ((target or flags[0]),), f"DEV={target}" if target else f"{flags[0]}=1"
    return (*GPU_ORDER, "CPU"), "none requested: the fastest available"


def select(
    environ: MutableMapping[str, str] = os.environ, threads: int | None = None
) -> DeviceChoice:
    """Select the device, in tinygrad too, and return it.

    Sets `DEV` in `environ`, so that child processes select the same, and removes the variables
    that tinygrad would refuse. With `threads`, CPU kernels are split over that many. Raises
    DeviceError, naming what is available and what to install.
    """
    check_tinygrad()
    candidates, reason = requested(environ)
    if threads is not None:
        set_thread_variable(environ, threads)
    for name in (*FLAGS, "GPU"):
        environ.pop(name, None)
    environ.pop("DEV", None)
    requested_threads(environ)
    failures: dict[str, str] = {}
    for target in candidates:
        if "CPU" in candidates and not may_have(target, environ):
            continue  # where a GPU is requested, what its backend says of its absence is shown
        try:
            choice = _open(target, reason)
        except DeviceError as error:
            failures[target] = str(error)
            continue
        if len(candidates) > 1 and choice.is_opencl_processor:
            continue  # no GPU, and slower than the CPU backend
        from tinygrad.helpers import DEV

        DEV.value = environ["DEV"] = target
        if target == "CPU" and "NVRTC" in failures.get("CUDA", ""):
            return replace(choice, reason=f"{reason}; CUDA: {failures['CUDA']}")
        return choice
    raise _refused(candidates, reason, failures)


def environment_of(target: str) -> dict[str, str]:
    """The environment for a process that selects `target` (DEV=), whatever is selected here."""
    kept = {name: value for name, value in os.environ.items() if name not in (*FLAGS, "GPU")}
    return kept | {"DEV": target}


def available() -> list[DeviceChoice]:
    """Every backend that works on this machine, the fastest first."""
    choices = []
    for target in (*GPU_ORDER, "CPU"):
        try:
            choices.append(_open(target, "available"))
        except DeviceError:
            continue  # absent, so not in the list
    return choices


def _refused(candidates: tuple[str, ...], reason: str, failures: Mapping[str, str]) -> DeviceError:
    """Why none of the candidates works, what is available, and what to install or to set."""
    name, _, rest = candidates[0].partition(":")
    name = name.upper()
    choices = available()
    there = ", ".join(choice.device for choice in choices) or "none"
    if "CPU" in candidates[1:]:  # none was requested, and not even the processor works
        return DeviceError(f"CPU: {failures['CPU']}; to use it, install {INSTALL['CPU']}")
    if len(candidates) > 1 and "NVRTC" in failures.get("CUDA", ""):
        return DeviceError(f"GPU=1: the card's CUDA does not work ({failures['CUDA']})")
    if len(candidates) > 1:
        opencl = any(choice.is_opencl_processor for choice in choices)
        return DeviceError(
            f"GPU=1: no GPU works here (tried {', '.join(candidates)}). Available: {there}"
            f"{' (CL is OpenCL on the processor; to use it, set CL=1)' if opencl else ''}. "
            f"A GPU needs {INSTALL['CUDA']}; {INSTALL['AMD']}; or its own OpenCL driver"
        )
    if rest and name in FLAGS:
        return DeviceError(
            f"{reason}: {candidates[0]} does not work ({failures[candidates[0]]}). Available here: "
            f"{there}. DEV={name} takes what {name} offers by itself"
        )
    if name not in FLAGS:
        listed = ", ".join(FLAGS)
        return DeviceError(f"{reason}: {failures[candidates[0]]}, only {listed}; here: {there}")
    return DeviceError(
        f"{reason}: {name} is not available ({failures[candidates[0]]}). "
        f"Available here: {there}. To use it, install {INSTALL.get(name, 'its driver')}"
    )


@functools.cache
def _open(target: str, reason: str) -> DeviceChoice:
    """Open a device as a program would; DeviceError says why it does not work."""
    name, _, rest = target.partition(":")
    name = name.upper()
    if name not in FLAGS:
        raise DeviceError(f"there is no backend called {name!r}")
    if name == "CPU" and not rest:
        _find_compiler()
    if DEFERRED_LLVM not in patches_off():
        defer_llvm()
    from tinygrad.device import Device
    from tinygrad.helpers import Context

    if name == "CL" and kernels_enabled_everywhere():
        # pocl 3.1 runs kernels with large private arrays wrongly on two threads. Only pocl reads
        # this, when it is loaded.
        os.environ["POCL_MAX_PTHREAD_COUNT"] = "1"
    if name in TRIED or rest.upper().startswith("CUDA"):
        _bind_nvrtc()
    try:
        with Context(DEV=target):
            opened = Device[name]
            if name in TRIED or (rest and name != "NULL"):
                _compute(name)  # a renderer or device number set by hand may not be installed
            renderer = type(opened.renderer).__name__.removesuffix("Renderer")
            on_processor = name == "CL" and opencl_is_processor(opened)
    # tinygrad's backends fail in many ways (a library that does not load, a missing driver, no
    # permission); each means that the device cannot be used, and the text is shown.
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        limit = None if isinstance(error, DeviceError) else 160
        raise DeviceError(first_line[:limit]) from error
    return DeviceChoice(name, renderer, _describe(name, opened), reason, on_processor)


@functools.cache
def nvrtc_library() -> nvrtc.Nvrtc | None:
    """CUDA's compiler, loaded; None if it is not installed (system/nvrtc.py says where)."""
    folders = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    toolkits = [Path(folder) for folder in (*folders, "/usr/local/cuda", "/opt/cuda")]
    return nvrtc.find(os.environ.get("NVRTC_PATH", ""), toolkits)


def _bind_nvrtc() -> None:
    """Let tinygrad load the NVRTC that we found; it does not look into packages.

    The variable that names it is there only meanwhile: what it holds counts as the user's choice,
    also in a process that this one starts.
    """
    if (found := nvrtc_library()) is None:
        return
    before = os.environ.get("NVRTC_PATH")
    os.environ["NVRTC_PATH"] = found.path
    try:
        bind_nvrtc()
    finally:
        del os.environ["NVRTC_PATH"]
        if before is not None:
            os.environ["NVRTC_PATH"] = before


def _find_compiler() -> None:
    """Raise DeviceError if tinygrad's C compiler, which CC may name, is missing or not clang."""
    compiler = os.environ.get("CC", "clang")
    if shutil.which(compiler) is None:
        raise DeviceError(f"the C compiler {compiler!r} is not installed")
    if "CC" in os.environ:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True)
        if "clang" not in version.stdout:
            raise DeviceError(f"CC={compiler} is not clang, which our kernels need: unset CC")


def _compute(name: str) -> None:
    """Raise whatever a small computation raises, or RuntimeError if its result is wrong."""
    from tinygrad import Tensor
    from tinygrad.device import Device
    from tinygrad.helpers import DEV, Context

    if name == "CUDA" and not DEV.target(name).renderer:  # by NVRTC, as our kernels are
        try_cuda(Device[name], nvrtc_library())
        return
    # Without tinygrad's cache, which must not be opened, and must not answer for the compiler.
    with Context(CACHELEVEL=0):
        numbers = Tensor([float(i) for i in range(64)], device=name).realize()
        result = (2 * numbers).contiguous().sum().item()
    if result != 4032:
        raise RuntimeError(f"computes wrong results: {result} instead of 4032")


def _describe(name: str, opened: object) -> str:
    """The device's name for itself, and what matters about it."""
    if name == "CPU":
        instructions = instruction_set()
        if instructions == "AMX":
            instructions += " (float32 products exact or bfloat16x3)"
        words = [processor.processor_name(), f"{threads()} threads", instructions]
        if processor.has_amx() and instruction_set() != "AMX":
            off = "is switched off" if not amx_enabled() else "is not permitted by the system"
            words.append(f"AMX {off}")
        return ", ".join(words)
    if name == "CUDA":
        compiler = nvrtc_library()
        return f"{cuda_name(opened)}, {compiler.line() if compiler else 'no NVRTC'}"
    return str(getattr(opened, "device_name", None) or getattr(opened, "arch", None) or name)


def threads() -> int:
    """How many threads a CPU kernel is split over (NUM_CPU_THREADS, or every core we may use).

    Raises DeviceError if that variable is not a number of threads.
    """
    from tinygrad.helpers import CPU_COUNT

    count = requested_threads()
    return int(CPU_COUNT.value) if count is None else set_threads(count)


def requested_threads(environ: Mapping[str, str] = os.environ) -> int | None:
    """NUM_CPU_THREADS, if it is set. Raises DeviceError if it is not a number of threads."""
    value = environ.get("NUM_CPU_THREADS", "")
    if value and (not value.isdecimal() or int(value) < 1):
        raise DeviceError(f"NUM_CPU_THREADS: got {value!r}, must be an integer of 1 or more")
    return int(value) if value else None


def set_thread_variable(environ: MutableMapping[str, str], count: int) -> None:
    """Set NUM_CPU_THREADS, for this process and its children. Raises DeviceError below one."""
    if count < 1:
        raise DeviceError(f"--threads: got {count}, must be 1 or more")
    environ["NUM_CPU_THREADS"] = str(count)


def set_threads(count: int) -> int:
    """Split CPU kernels over `count` threads from here on. Raises DeviceError below one."""
    from tinygrad.helpers import CPU_COUNT
    from tinygrad.renderer.cstyle import ClangRenderer

    set_thread_variable(os.environ, count)
    CPU_COUNT.value = count
    ClangRenderer.global_max = (count, 0, 0)
    return count


def instruction_set() -> str:
    """The vector instructions that CPU kernels use; TINYLLAMA_AMX=0 leaves AMX out."""
    return processor.instruction_set(amx_enabled())


def amx_enabled() -> bool:
    """False when TINYLLAMA_AMX=0 switches AMX off."""
    return os.environ.get("TINYLLAMA_AMX", "1") != "0"


def kernels_enabled() -> bool:
    """False when TINYLLAMA_KERNELS=0 selects the portable form of every operation."""
    return os.environ.get("TINYLLAMA_KERNELS", "1") != "0"


def kernels_enabled_everywhere() -> bool:
    """True when TINYLLAMA_KERNELS=all uses kernels for a GPU also in OpenCL on the processor.

    There the portable form is faster: this is for tests.
    """
    return os.environ.get("TINYLLAMA_KERNELS", "1") == "all"


@functools.cache
def check_tinygrad() -> None:
    """Raise DeviceError unless tinygrad is TINYGRAD or TINYLLAMA_ANY_TINYGRAD=1 is set."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = f"tinygrad {version('tinygrad')} is installed"
    except PackageNotFoundError:
        installed = "no tinygrad is installed"
    if (
        installed != f"tinygrad {TINYGRAD} is installed"
        and os.environ.get("TINYLLAMA_ANY_TINYGRAD", "") != "1"
    ):
        raise DeviceError(
            f"{installed}, must be {TINYGRAD}, which our patches of it are written for: "
            f"`pip install tinygrad=={TINYGRAD}`"
        )


def compiler_identity() -> str:
    """tinygrad's C compiler: its file, size and date, which an update changes; "" if absent."""
    found = shutil.which(os.environ.get("CC", "clang"))
    if found is None:
        return ""
    file = os.path.realpath(found)
    status = os.stat(file)
    return f"{file} {status.st_size} {status.st_mtime_ns}"


def cache_folder() -> Path:
    """What of ours is kept for all of a user's runs: tinyllama in XDG_CACHE_HOME (~/.cache)."""
    caches = os.environ.get("XDG_CACHE_HOME", "") or os.path.expanduser("~/.cache")
    return Path(caches).absolute() / "tinyllama"


def kernel_cache_folder() -> Path:
    """Where compiled kernels are kept: TINYLLAMA_KERNEL_CACHE, or kernels in `cache_folder`."""
    named = os.environ.get("TINYLLAMA_KERNEL_CACHE", "")
    return Path(named).absolute() if named else cache_folder() / "kernels"


def otlp_endpoint() -> str | None:
    """The collector that OTEL_EXPORTER_OTLP_ENDPOINT names for all programs, if it is set."""
    return os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip() or None


def is_cpu() -> bool:
    """Whether the selected device is the processor, driven by tinygrad's CPU backend."""
    from tinygrad import Device

    return bool(Device.DEFAULT.partition(":")[0] == "CPU")


def patches_off() -> tuple[str, ...]:
    """Names of the patches of tinygrad that TINYLLAMA_PATCHES_OFF="name,name" switches off."""
    names = os.environ.get("TINYLLAMA_PATCHES_OFF", "").split(",")
    return tuple(name.strip() for name in names if name.strip())
