"""The proof of SFT and DPO on a real model: its rows, what it measures, and what it writes."""

import compare_peft
import preferences
import pytest

from docs import placed

ROW = {"text": 'def read(path):\n    """Return the text,\n    or None."""\n'}


def test_a_row_becomes_a_question_and_its_answer() -> None:
    chat = preferences.conversation(ROW)
    user, assistant = chat["messages"]
    assert user == {"role": "user", "content": f"{preferences.ASK}def read(path):"}
    assert assistant == {"role": "assistant", "content": '"""Return the text,\n    or None."""'}
    assert preferences.pair(chat, "sampled") == {
        "prompt": user["content"], "chosen": assistant["content"], "rejected": "sampled",
    }  # fmt: skip


def test_rows_are_taken_at_equal_distances() -> None:
    rows = [*range(10)]
    assert preferences.spread(rows, 4) == [0, 2, 5, 7]
    assert preferences.spread(rows, 20) == rows


def test_words_are_shared_as_often_as_they_occur() -> None:
    assert preferences.f1("a a b".split(), "a b c".split()) == pytest.approx(2 / 3)
    assert preferences.f1([], ["a"]) == preferences.f1(["x"], ["a"]) == 0
    assert preferences.shared_words(["A b", "x"], ["a B", "y"]) == 0.5


def results(**dpo: float) -> dict[str, object]:
    first = {"val_accuracy": 0.0, "val_margin": 0.0, "val_loss": 0.6931}
    last = {"val_accuracy": 0.9, "val_margin": 0.5, "val_loss": 0.5,
            "val_reward_chosen": 0.1, "val_reward_rejected": -0.4}  # fmt: skip
    return {
        "sft": [{"val_loss": 4.0}, {"val_loss": 2.5}],
        "dpo": [first, last | dpo],
        "sft_loss": 2.5, "dpo_loss": 2.6, "words_before": 0.2, "words_after": 0.25,
        "steps": {"sft": 60, "dpo": 30}, "rows": {"sft": 100, "held_out": 120},
        "pairs": {"held_out": 120, "test": 64}, "dtype": "float32",
    }  # fmt: skip


def test_what_does_not_improve_is_a_problem_on_the_page() -> None:
    assert [*preferences.problems(results())] == []
    page = preferences.report(results())
    assert "| loss of the real docstring, nats per token | 4.0000 | 2.5000 | 2.6000 |" in page
    assert "| 0.0% | 90.0% |" in page and page.rstrip().endswith("Every check holds.")
    bad = results(val_accuracy=0.5)
    assert [*preferences.problems(bad)] == ["DPO: accuracy 0.500, margin 0.500"]
    worse = results() | {"sft": [{"val_loss": 2.0}, {"val_loss": 2.0}]}
    assert [*preferences.problems(worse)] == ["SFT: held-out loss goes from 2.0000 to 2.0000"]


def test_a_part_of_a_page_is_replaced_or_added_and_the_other_tool_keeps_it(tmp_path) -> None:
    page = placed("# Title\n", preferences.NAME, "one\n")
    assert page == "# Title\n\n<!-- preferences -->\none\n<!-- end of preferences -->\n"
    assert placed(page, preferences.NAME, "two") == page.replace("one", "two")
    path = tmp_path / "page.md"
    assert compare_peft.kept_part(path) == ""
    path.write_text(page)
    assert "new\n" + compare_peft.kept_part(path) == page.replace("# Title\n", "new\n")
