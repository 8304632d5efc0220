"""What the steps of 124m, 8 x 1024, must be on NVIDIA's cards; compiled, no card is needed."""

import json

import pytest
from fake_cuda import needs_nvrtc
from runs_helpers import ROOT

from tinyllama.reports import backends
from tinyllama.reports.backends import Row

KERNELS, FLOPS_RATIO, TENSOR_CORE_SHARE, SHARED_BYTES = 900, 1.05, 0.99, 48 << 10
# Of a full step in bfloat16; 30.2e9 before products shared launches with what reads them.
STEP_BYTES = 25e9


def holds(row: dict[str, object]) -> None:
    for name, value, most in (
        ("kernels_per_step", row["kernels_per_step"], KERNELS),
        ("flops_ratio", row["flops_ratio"], FLOPS_RATIO),
        ("spilled_bytes", row["spilled_bytes"], 0),
    ):
        assert isinstance(value, int | float) and value <= most, (name, row)
    assert isinstance(row["tensor_core_share"], float)
    assert row["tensor_core_share"] >= TENSOR_CORE_SHARE, row
    if (row["form"], row["dtype"]) == ("full", "bfloat16"):
        assert isinstance(row["bytes_per_step"], int) and row["bytes_per_step"] <= STEP_BYTES, row


@needs_nvrtc
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_full_step_holds_the_bars(dtype: str) -> None:
    row = backends._in_a_process(Row("CUDA sm_90", "NULL:CUDA:sm_90", "compiled", dtype=dtype))
    holds(row)
    reserved = 1024  # by the card
    assert row["_compiled"]["shared_bytes"] <= SHARED_BYTES + reserved


def test_the_report_that_is_shipped_holds_the_bars() -> None:
    rows = json.loads((ROOT / "docs" / "backends.json").read_text())
    cards = [row for row in rows if row["checked"] == "compiled"]
    assert len(cards) == 12
    for row in cards:
        holds(row)
