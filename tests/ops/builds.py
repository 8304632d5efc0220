"""What the harnesses and the fuzzers of C kernels share: how they are built, in which forms."""

import platform
from pathlib import Path

CPU = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
COMMON = ["-fno-math-errno", "-Wno-psabi", CPU, "-fno-sanitize-recover=all"]
# Undefined behaviour ends the program without a message: this builds in half the time.
SILENT = ["-fsanitize-trap=undefined"]
# Kernels cannot allocate, so leaks are those of the harness and ignored.
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0"}


def variants(source: Path) -> list[str]:
    """The lists of flags in which a source is to be built, each as one string; it lists them in
    comment lines, `// variants: -DX=1 -DY=2; -DX=2`. Without such a line: once, without flags."""
    found = []
    for line in source.read_text().splitlines():
        if line.startswith("// variants:"):
            flags = line.removeprefix("// variants:").split(";")
            found += [" ".join(f.split()) for f in flags if f.strip()]
    return found or [""]
