"""What tools/mutants.py computes from mutmut's results."""

import mutants

PRINTED = """
    tinyllama.lora.x_start__mutmut_1: killed
    tinyllama.lora.xǁLoRALinearǁ__init____mutmut_2: survived
    tinyllama.weights.peft.x_scale__mutmut_3: timeout
    tinyllama.lora.x_start__mutmut_4: no tests
To see more: run mutmut browse
"""


def test_only_a_failing_test_counts() -> None:
    found = mutants.statuses(PRINTED)
    assert [status for _, status in found] == ["killed", "survived", "timeout", "no tests"]
    assert mutants.killed_share(status for _, status in found) == 0.25
    assert mutants.killed_share([]) == 0


def test_the_table_has_one_row_per_file_and_one_for_all() -> None:
    rows = mutants.table(mutants.statuses(PRINTED))
    assert [tuple(row.values()) for row in rows] == [
        ("tinyllama/lora.py", "3", "1", "1", "0", "1", "33.3%"),
        ("tinyllama/weights/peft.py", "1", "0", "0", "1", "0", "0.0%"),
        ("all", "4", "1", "1", "1", "1", "25.0%"),
    ]


def test_the_report_is_a_markdown_table(monkeypatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.0")  # an extra of its own
    text = mutants.report(mutants.table(mutants.statuses(PRINTED)), 0.25)
    assert ": 25.0% of the changes made a test fail (required: 85%)" in text
    assert "| all | 4 | 1 | 1 | 1 | 1 | 25.0% |\n" in text
    assert text.count("|---") == 7
