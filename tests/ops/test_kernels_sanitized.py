"""Every kernel harness in tests/ops/kernels, built with the address and UB sanitizers.

A harness is a C program that compares a kernel with a plain reference and exits 1 where they
differ. It lists the forms to build in comment lines, see builds.py.
"""

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from builds import COMMON, ENVIRONMENT, SILENT, variants

KERNELS = Path(__file__).parent / "kernels"
SANITIZE = ["-fsanitize=address,undefined"]
BUILD = ["clang", "-O0", "-Werror", *COMMON, *SANITIZE]
SECONDS = 240


def every_build() -> list[tuple[str, str]]:
    return [(h.name, v) for h in sorted(KERNELS.glob("*_harness.c")) for v in variants(h)]


def start(command: list[str]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **ENVIRONMENT}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False, env=env
    )


def run(command: list[str]) -> None:
    """Run a command that must succeed; its output is shown if it does not."""
    done = start(command)
    said = f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert done.returncode == 0, f"{' '.join(command)}\n{said}"


@functools.cache
def sanitizers_work(folder: Path) -> bool:
    """Without clang's runtime library nothing links: say what to install instead of skipping."""
    assert shutil.which("clang"), "the kernels need clang: apt-get install clang"
    (folder / "empty.c").write_text("int main(void) { return 0; }\n")
    command = ["clang", *SANITIZE, str(folder / "empty.c"), "-o", str(folder / "empty")]
    done = start(command)
    hint = "the sanitizers need clang's runtime library: apt-get install libclang-rt-14-dev"
    assert done.returncode == 0, f"{hint}\n{done.stderr}"
    return True


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("kernels")
    assert sanitizers_work(folder)
    return folder


@pytest.mark.parametrize(("harness", "flags"), every_build())
def test_kernel_agrees_with_its_reference_and_stays_in_bounds(
    harness: str, flags: str, build_folder: Path
) -> None:
    program = build_folder / "harness"
    build = [*BUILD, *flags.split(), str(KERNELS / harness), "-o", str(program), "-lm"]
    run([*build, *SILENT])
    if start([str(program)]).returncode != 0:
        run([*build, "-g"])  # names the line
        run([str(program)])
        pytest.fail(f"{harness} {flags} failed, and did not when it was built to say where")


def test_a_harness_lists_its_variants() -> None:
    assert len(variants(KERNELS / "gemm_harness.c")) > 20


def test_a_read_past_the_end_is_found(build_folder: Path) -> None:
    """The sanitizers do see a kernel's vector loads: one that starts in bounds and ends beyond."""
    source = build_folder / "beyond.c"
    common = KERNELS.parents[2] / "tinyllama" / "ops" / "cpu" / "common.h"
    source.write_text(
        f'#include <stdlib.h>\n#include "{common}"\n'
        "int main(void) { float *x = calloc(VW - 1, 4); return vload(x)[0] != 0; }\n"
    )
    program = build_folder / "beyond"
    run([*BUILD, str(source), "-o", str(program)])
    done = start([str(program)])
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
