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


def opened(file, first_step, **options):
    """The notices of a log that is opened for steps from `first_step` on."""
    notices = []
    MetricsLog(file, first_step, notice=notices.append, **options).close()
    return notices


def lines(*steps):
    return "".join(f'{{"step": {step}}}\n' for step in steps)


@pytest.mark.parametrize(
    "damage",
    [
        "step 2\n",
        '{"loss": 1}\n',
        '{"step": 2, "lo\n',
        "\0" * 40 + "\n",
        '{"step": true}\n',
        '{"step": -1}\n',
        '{"step": 2, "loss": "low"}\n',
        '{"step": 2, "loss": NaN}\n',
        '{"step": 2, "loss": null}\n',
        f'{{"step": {10**400}}}\n',
        "[" * 10**5 + "\n",
        "[]\n",
        "x" * (1 << 20) + "\n",
    ],
)
def test_damaged_lines_are_left_out_and_kept_aside(tmp_path, damage):
    file = tmp_path / "metrics.jsonl"
    was = lines(1) + damage + lines(3, 4, 5)
    file.write_text(was)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: not a metrics file: line 2") as e:
        read_metrics(file)
    assert len(str(e.value)) < 500
    damaged, gap = opened(file, 4)
    assert damaged.endswith("damaged and left out; the file as it was is now metrics.jsonl.aside-1")
    assert gap == f"{file}: lacks step 2; the run goes on, and its curve has a gap there"
    assert read_metrics(file) == [{"step": 1}, {"step": 3}]
    assert (tmp_path / "metrics.jsonl.aside-1").read_text() == was
    assert opened(file, 2) == []


@pytest.mark.parametrize(
    ("steps", "first_step", "lacking"),
    [
        ([1, 2, 3], 4, None),
        ([0, 1, 2, 3], 4, None),
        ([7, 8], 9, None),  # a run that came in from another folder
        ([1, 2], 4, "step 3"),
        ([1, 4, 5], 9, "steps 2 to 3 and 3 more"),
        ([], 3, "steps 1 to 2"),
        ([], 1, None),
        ([5, 6], 3, "steps 1 to 2"),
    ],
)
def test_a_gap_is_noticed(tmp_path, steps, first_step, lacking):
    file = tmp_path / "metrics.jsonl"
    file.write_text(lines(*steps) + '{"step": 99, "lo')
    said = f"{file}: lacks {lacking}; the run goes on, and its curve has a gap there"
    assert opened(file, first_step) == ([] if lacking is None else [said])


def test_a_file_that_is_missing_is_noticed_where_the_run_wrote_it(tmp_path):
    assert opened(tmp_path / "a", 5) == []
    assert len(opened(tmp_path / "b", 5, is_expected=True)) == 1


def test_a_file_that_was_removed_or_replaced_is_noticed(tmp_path):
    file = tmp_path / "run" / "metrics.jsonl"
    file.parent.mkdir()
    log = MetricsLog(file, 1)
    assert not log.is_gone()
    file.rename(tmp_path / "elsewhere")
    assert log.is_gone()
    file.write_text("of another run")
    assert log.is_gone()
    file.unlink()
    log.reopen()
    log.write({"step": 2})
    log.close()
    assert read_metrics(file) == [{"step": 2}]


def test_lines_are_on_disk_after_a_sync(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    log = MetricsLog(tmp_path / "metrics.jsonl", 1)
    log.write({"step": 1})

    def recorded(handle):
        synced.append(os.fstat(handle).st_size)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", recorded)
    log.sync()
    assert synced == [12]
    log.close()
