"""CrossHair finds no arguments that break a contract, and finds those of one that is broken."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONTRACTS = Path(__file__).with_name("contracts.py")
CROSSHAIR = Path(sys.executable).with_name("crosshair")
pytestmark = pytest.mark.skipif(
    not CROSSHAIR.exists() and shutil.which("crosshair") is None, reason="no crosshair here"
)


def checked(file: Path, seconds: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "crosshair", "check", "--analysis_kind=asserts"]
    command += [f"--per_condition_timeout={seconds}", str(file)]
    return subprocess.run(command, capture_output=True, text=True)


def test_no_contract_is_broken() -> None:
    found = checked(CONTRACTS, 3)
    assert (found.returncode, found.stdout) == (0, ""), found.stdout + found.stderr


WRONG = '''
def a_square_is_larger(x: int) -> None:
    """False for 1."""
    assert x > 0
    assert x * x > x
'''


def test_a_broken_contract_is_found(tmp_path: Path) -> None:
    broken = tmp_path / "wrong.py"
    broken.write_text(WRONG)
    found = checked(broken, 20)
    assert found.returncode == 1
    assert "AssertionError" in found.stdout and "a_square_is_larger(1)" in found.stdout
