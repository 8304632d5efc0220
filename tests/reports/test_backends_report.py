"""The report of backends: which rows, which fields, and that its figures are the step's own."""

import json
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import needs_nvrtc
from runs_helpers import run_command

from tinyllama.errors import DeviceError, TrainingError
from tinyllama.reports import backends
from tinyllama.reports.backends import Row, document, rows

# SPEC's.
FIELDS = {
    "backend", "form", "dtype", "kernels_per_step", "config", "micro_batch", "context_length",
    "flops_ratio", "bytes_per_step", "tensor_core_share", "spilled_bytes", "checked",
}  # fmt: skip
SMALL: dict[str, Any] = {"config": "demo", "micro_batch": 2, "context_length": 64}


def test_nvidias_cards_are_there_with_every_form_and_type() -> None:
    found = {
        (row.backend, row.form, row.dtype)
        for row in rows()
        if (row.config, row.micro_batch, row.context_length) == ("124m", 8, 1024)
        and row.checked == "compiled"
    }
    assert found == {
        (f"CUDA {arch}", form, dtype)
        for arch in ("sm_80", "sm_90")
        for form in ("full", "lora", "qlora")
        for dtype in ("float32", "bfloat16")
    }
    assert {row.backend for row in rows()} >= {"CPU", "OpenCL", "Metal"}
    assert {row.checked for row in rows()} == {"run", "emulated", "compiled"}


@pytest.mark.parametrize("form", backends.FORMS)
def test_a_form_trains_what_its_name_says(form: backends.Form) -> None:
    config = Row("CPU", "CPU", "run", form=form, dtype="bfloat16").configuration()
    assert (config.lora is not None) == (form != "full")
    assert (config.qlora is not None) == (form == "qlora")
    assert config.training.dtype == "bfloat16"
    assert (config.training.micro_batch, config.context_length) == (8, 1024)


def test_the_processors_row_is_run() -> None:
    row = backends._in_a_process(Row("CPU", "CPU", "run", **SMALL))
    assert {name for name in row if not name.startswith("_")} == FIELDS
    assert row["kernels_per_step"] > 100 and row["spilled_bytes"] is None
    assert 1 < row["flops_ratio"] < 1.1
    # Weights, gradients and two moments are read or written at least 28 bytes a parameter.
    assert row["bytes_per_step"] > 28 * 5_000_000
    assert row["tensor_core_share"] == 0


@needs_nvrtc
def test_a_row_for_a_card_is_compiled() -> None:
    row = backends._in_a_process(
        Row("CUDA sm_80", "NULL:CUDA:sm_80", "compiled", dtype="bfloat16", **SMALL)
    )
    assert row["checked"] == "compiled" and row["spilled_bytes"] == 0
    assert row["tensor_core_share"] > 0.9
    text = document([row])
    assert text.splitlines()[-1].startswith("| CUDA sm_80 | full | bfloat16 | demo, 2 x 64 | ")


def test_a_backend_that_is_not_here_is_left_out_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"backend": "B", "form": "full", "dtype": "float32", "checked": "run"}
    answer = dict.fromkeys(FIELDS, 1) | words | {"_memory": 10**9, "_compiled": None}

    def one(row: Row) -> dict[str, Any]:
        if row.backend != "CPU":
            raise DeviceError("no driver")
        return answer

    monkeypatch.setattr(backends, "_in_a_process", one)
    lines: list[str] = []
    backends.write(tmp_path / "new" / "docs", lines.append)
    assert lines[:3] == ["CPU full float32 demo: run", "OpenCL full float32 demo: run",
                         "left out: no driver"]  # fmt: skip
    (found,) = json.loads((tmp_path / "new" / "docs" / "backends.json").read_text())
    assert set(found) == FIELDS and found["backend"] == "B"
    assert (
        "| B | full | float32 | 1, 1 x 1 | 1 |" in (tmp_path / "new/docs/BACKENDS.md").read_text()
    )


def test_a_process_that_fails_is_named_with_its_last_line() -> None:
    with pytest.raises(DeviceError, match="there is no backend called 'NONE'"):
        backends._in_a_process(Row("none", "NONE", "run", **SMALL))
    with pytest.raises(TrainingError, match=r"CPU: .*wrong: no such file"):
        backends._in_a_process(Row("CPU", "CPU", "run", config="wrong"))


def test_the_report_goes_into_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    code, out, errors = run_command("backends", "--report", file)
    assert (code, out) == (2, "")
    assert errors == f"--report {file}: is a file, must be a folder\n"
