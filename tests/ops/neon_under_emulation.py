"""Every kernel harness in tests/kernels as NEON code, run by an emulator: `make neon`.

The name of this file keeps it out of a run of all tests: it needs packages of 200 MB.
"""

import subprocess
from pathlib import Path

import pytest
from test_kernels_sanitized import KERNELS, every_build

ROOT = Path("/usr/aarch64-linux-gnu")
BUILD = [
    *("clang", "--target=aarch64-linux-gnu", "-march=armv8.2-a+fp16", "-O2", "-fno-math-errno"),
    *("-Wno-psabi", f"-I{ROOT}/include", f"-L{ROOT}/lib", "-fuse-ld=lld", "-static"),
]
EMULATOR = ["qemu-aarch64", "-cpu", "max"]


def libraries() -> list[str]:
    """Where the compiler's own library for that machine lies."""
    (folder,) = Path("/usr/lib/gcc-cross/aarch64-linux-gnu").iterdir()
    return [f"-B{folder}", f"-L{folder}"]


@pytest.mark.parametrize(("harness", "flags"), every_build())
def test_kernel_agrees_with_its_reference(harness: str, flags: str, tmp_path: Path) -> None:
    program = tmp_path / "harness"
    source = [*flags.split(), str(KERNELS / harness), "-o", str(program), "-lm", "-lpthread"]
    subprocess.run([*BUILD, *libraries(), *source], check=True)
    done = subprocess.run([*EMULATOR, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
