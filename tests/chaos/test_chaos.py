"""A short form of `make chaos`: each kind of fault a few times, with seeds of its own."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from broken_disk import on_a_broken_disk
from chaos import KINDS, Count, attempt, table
from lab import Failure, Fault, Lab, Skipped, newest, spread
from runs import damage

TRIES = {"dies_at_a_call": 3, "calls_fail": 3, "bits_flip": 4}
SEED = 900_000


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if os.name != "posix" or shutil.which("clang") is None or not os.path.exists("/proc/self/fd"):
        pytest.skip("needs Linux and clang")
    made = Lab(tmp_path_factory.mktemp("chaos").resolve())
    yield made
    made.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_survives(lab: Lab, kind: str) -> None:
    make, _ = KINDS[kind]
    for number in range(TRIES.get(kind, 1)):
        try:
            make(lab, SEED + 37 * number)
        except Skipped as why:
            pytest.skip(str(why))


def test_what_is_lost_is_noticed(lab: Lab) -> None:
    """The checks themselves: another loss, a damaged and a missing checkpoint, something left."""
    lab.anew("done")
    lab.holds()
    metrics = lab.run / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text(text.replace('"loss": ', '"loss": 1', 1))
    with pytest.raises(Failure, match="other losses"):
        lab.holds()
    metrics.write_text(text)
    (lab.run / ".final.partial-1").touch()
    with pytest.raises(Failure, match="left behind"):
        lab.holds()
    (lab.run / ".final.partial-1").unlink()
    assert newest(lab.run) == 6
    (lab.run / "final" / "model.safetensors").write_bytes(b"")
    assert newest(lab.run) == 4
    count = Count(begun=1)
    attempt(lab, "killed", lambda lab, seed: lab.continued(6) or 1, count, 5)
    assert count.tries == 1 and "step 6 was saved" in count.failures[0]
    assert "| 1 | 0 | 1 |" in table({"killed": count}, 5, 60)


def test_files_fail_by_their_seed(lab: Lab) -> None:
    def failing(seed: int) -> tuple[int, str]:
        lab.anew()
        ended = lab.train(fault=Fault(seed, 1.0))
        return ended.code, ended.err

    code, err = failing(1)
    assert code == 2 and err.strip() and "Traceback" not in err
    assert failing(1) == (code, err)


def test_damage_changes_a_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    import random

    file = tmp_path_factory.mktemp("damage") / "file"
    for seed in range(50):
        file.write_bytes(bytes(100))
        damage(file, random.Random(seed))
        assert file.read_bytes() != bytes(100)


def test_consecutive_seeds_reach_every_call_once() -> None:
    for calls in (1, 2, 500, 7919, 2 * 7919):
        assert {spread(seed, calls) for seed in range(3, 3 + calls)} == set(range(1, calls + 1))
    assert len({spread(seed, 1000) // 100 for seed in range(1, 12)}) > 7


def test_a_stopped_run_goes_on(lab: Lab) -> None:
    lab.anew()
    ended = lab.train(fault=Fault(at_call=lab.calls // 2, signal=signal.SIGSTOP))
    assert (ended.code, ended.stops) == (0, 1)
    lab.holds()


def test_a_broken_disk_is_one(tmp_path: Path) -> None:
    """Read at first; then EIO."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * 9000)
    try:
        with on_a_broken_disk(file) as disk:
            assert file.read_bytes() == b"x" * 9000 and disk.failed == 0
            disk.breaks()
            with pytest.raises(OSError, match="Input/output error"):
                file.read_bytes()
            assert disk.failed > 0
    except Skipped as why:
        pytest.skip(str(why))
    assert file.read_bytes() == b"x" * 9000
