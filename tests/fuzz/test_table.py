"""What fuzzing runs record, and its sum."""

import json
from pathlib import Path

import pytest
from fuzz import level, lines_of, table, written


def test_runs_add_up(tmp_path: Path) -> None:
    record = tmp_path / "record"
    first = {"date": "2026-11-26", "commit": "abc", "seed": 1, "seconds": 90}
    second = {"date": "2026-11-27", "commit": "def", "seed": 2, "seconds": 30}
    lines = [
        {**first, "name": "toml", "inputs": 1000, "findings": 1},
        {**first, "name": "gemm -DX=1", "inputs": 20, "findings": 0},
        {**second, "name": "gemm -DX=2", "inputs": 3, "findings": 0},
        {**second, "name": "toml", "inputs": 5, "findings": 0},
    ]
    record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = table(lines_of(record)).splitlines()
    assert rows[2:5] == ["| `toml` | 1,005 | 1 |", "| `gemm` | 23 | 0 |",
                         "| **together** | 1,028 | 1 |"]  # fmt: skip
    assert rows[-2:] == ["| 2026-11-26 | abc | 1 | 3 | 1,020 |", "| 2026-11-27 | def | 2 | 1 | 8 |"]
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- begin fuzz -->\nold\n<!-- end fuzz -->\nb\n")
    written(page, "new")
    assert page.read_text() == "a\n<!-- begin fuzz -->\nnew\n<!-- end fuzz -->\nb\n"


@pytest.mark.parametrize(
    ("seconds", "flags", "optimized"),
    [(60, "", "-O0"), (600, "-DT=1", "-O1"), (600, "-DPACKED -DX=1", "-O0")],
)
def test_long_runs_are_built_to_be_fast(seconds: float, flags: str, optimized: str) -> None:
    assert level(seconds, flags) == optimized
