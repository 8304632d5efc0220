"""The time that other programs took is what the kernel says of each thread."""

from pathlib import Path

from tinyllama.system.waiting import Waiting


def write(tasks: Path, **nanoseconds: int) -> None:
    for name, waited in nanoseconds.items():
        (tasks / name).mkdir(exist_ok=True)
        (tasks / name / "schedstat").write_text(f"5000000 {waited} 17\n")


def test_the_longest_wait_of_a_thread_since_the_last_question_counts(tmp_path: Path) -> None:
    write(tmp_path, a=1_000_000_000, b=5_000_000_000)
    waiting = Waiting(str(tmp_path))
    assert waiting.take() == 0.0
    write(tmp_path, a=1_250_000_000, b=5_100_000_000, c=9_000_000_000)
    assert waiting.take() == 0.25  # a thread that is new has not waited within a step
    assert waiting.take() == 0.0


def test_threads_that_have_ended_hide_no_other(tmp_path: Path) -> None:
    ended = [tmp_path / f"ended-{number}" for number in range(20)]
    for thread in ended:
        thread.mkdir()
    write(tmp_path, a=1_000_000_000, b=1_000_000_000)
    waiting = Waiting(str(tmp_path))
    write(tmp_path, a=1_500_000_000, b=2_000_000_000)
    assert waiting.take() == 1.0


def test_it_is_none_where_the_system_does_not_say(tmp_path: Path) -> None:
    assert Waiting(str(tmp_path / "missing")).take() == 0.0
    write(tmp_path, a=1)
    (tmp_path / "a" / "schedstat").write_text("no numbers")
    assert Waiting(str(tmp_path)).take() == 0.0
