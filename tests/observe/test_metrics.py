"""metrics.jsonl: one whole line per step, each step once, whatever a killed run left."""

import os

import pytest

from tinyllama.errors import CheckpointError
from tinyllama.observe.metrics import MetricsLog, read_metrics


def test_a_line_is_in_the_file_before_the_next_step(tmp_path):
    file = tmp_path / "metrics.jsonl"
    log = MetricsLog(file, 1)
    log.write({"step": 1, "loss": 2.5})
    assert file.read_text() == '{"step": 1, "loss": 2.5}\n'
    log.close()


def test_lines_of_steps_to_come_are_dropped_and_earlier_ones_kept(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    log = MetricsLog(file, 3)
    log.write({"step": 3, "loss": 1.0})
    log.close()
    assert read_metrics(file) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]


def test_numbers_are_read_back_as_they_were(tmp_path):
    values = {"step": 1, "loss": 0.1 + 0.2, "lr": 1e-300, "memory_bytes": 2**60 + 1}
    log = MetricsLog(tmp_path / "metrics.jsonl", 1)
    log.write(values)
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [values]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device here")
def test_a_full_disk_names_the_file(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 1)
    log._file.close()
    log._file = open("/dev/full", "a")  # every write to it fails so
    for failing in (lambda: log.write({"step": 1}), log.close):
        with pytest.raises(OSError, match="No space left on device: ") as failed:
            failing()
        assert failed.value.filename == str(tmp_path / "metrics.jsonl")


def test_a_file_that_holds_something_else_is_named(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("step 1\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: not a metrics file"):
        MetricsLog(file, 2)
    assert file.read_text() == "step 1\n"


def test_a_line_that_is_no_step_is_named(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"loss": 1}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: not a metrics file"):
        MetricsLog(file, 2)
