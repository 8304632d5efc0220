"""The tool that counts how often anomalies are found: its text, its faults, its table."""

import json
from pathlib import Path

import anomalies
import pytest

GOOD = "def usual(value):\n    return value + 1\n" * 100


def note(step: int, series: str, **more: object) -> dict[str, object]:
    return {"step": step, "series": series, **more}


def faulty(*notes: dict[str, object]) -> dict[str, object]:
    steps = {"thread": 110, "disk": 160, "rate": 250}
    return {"steps": steps, "document": "text.jsonl row 7", "notes": list(notes), "made": 320}


@pytest.mark.parametrize("seed", range(4))
def test_damage_of_each_kind_is_2000_characters_unlike_the_text(seed: int) -> None:
    text = anomalies.damaged(seed, GOOD)
    assert len(text) == 2000 and text == anomalies.damaged(seed, GOOD)
    assert sum(text.count(word) for word in ("usual", "return", "value")) == 0


def test_a_text_is_a_selection_with_the_damage_in_the_row_that_is_named(tmp_path: Path) -> None:
    corpus, file = tmp_path / "corpus.jsonl", tmp_path / "text.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"row {i} {GOOD}"}) + "\n" for i in range(40)))
    assert anomalies.write_text(corpus, file, 3, faulty=False) is None
    rows = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert len(rows) == 40 and all(row.endswith(GOOD) for row in rows)
    row = anomalies.write_text(corpus, file, 3, faulty=True)
    rows = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert row is not None and rows[row - 1] == anomalies.damaged(3, max(rows, key=len))


def test_a_fault_is_found_by_a_note_of_its_series_in_time() -> None:
    for fault, right, wrong in (
        ("thread", note(110, "step_seconds"), note(119, "step_seconds")),
        ("disk", note(180, "data_seconds"), note(181, "data_seconds")),
        ("rate", note(250, "update"), note(249, "update")),
        ("rate", note(258, "loss"), note(250, "step_seconds")),
    ):
        assert anomalies.is_found(fault, faulty(right))
        assert not anomalies.is_found(fault, faulty(wrong))


def test_a_document_is_found_where_its_row_is_named_before_the_rate_is_wrong() -> None:
    named = {"documents": ["text.jsonl row 6", "text.jsonl row 7"]}
    assert anomalies.is_found("document", faulty(note(40, "text", **named)))
    assert not anomalies.is_found("document", faulty(note(250, "text", **named)))
    assert not anomalies.is_found("document", faulty(note(40, "text", documents=["row 6"])))
    assert not anomalies.is_found("document", faulty(note(40, "step_seconds", **named)))


def test_the_table_counts_every_note_of_a_clean_run_and_each_fault_that_is_found() -> None:
    clean = [
        {"notes": [note(9, "loss"), note(10, "loss")], "made": 320},
        {"notes": [], "made": 180},
    ]
    runs = [faulty(note(111, "step_seconds"), note(250, "update")), faulty()]
    shown = anomalies.table(clean, runs).splitlines()
    assert (
        shown[2] == "| none | 2 runs, 500 steps | 2 false alarms, 4.00 per 1,000 steps (loss 2) |"
    )
    assert [line.rpartition("| found ")[2] for line in shown[3:]] == [
        "in 1, 50% |", "in 0, 0% |", "in 1, 50% |", "in 0, 0% |",
    ]  # fmt: skip
