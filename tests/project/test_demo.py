"""The demo's own arithmetic, and the picture of a loss curve."""

import gzip
import json
from pathlib import Path

import demo
import plot_loss
import pytest

from tinyllama.reports import plot

PNG = b"\x89PNG\r\n\x1a\n"


def rows_file(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def metrics(steps: int) -> list[dict[str, float]]:
    rows = [{"step": step, "loss": 8 - step / steps} for step in range(1, steps + 1)]
    rows[-1]["val_loss"] = 7.1
    return rows


def test_gzip_packs_all_held_out_text_as_one_stream(tmp_path: Path) -> None:
    texts = ["one text\n" * 50, "another ätext\n" * 50]
    found = demo.gzip_bits_per_byte(rows_file(tmp_path / "val.jsonl", texts))
    data = "".join(texts).encode()
    assert found == 8 * len(gzip.compress(data, 9)) / len(data)
    assert found < 8 * sum(len(gzip.compress(t.encode(), 9)) for t in texts) / len(data)


def test_validation_while_training_reads_a_part_of_each_file(tmp_path: Path) -> None:
    held_out = rows_file(tmp_path / "val.jsonl", ["a" * 60 + "b" * 60, "c", "d" * 1200])
    demo.write_part(held_out, tmp_path / "part.jsonl")
    parts = demo.texts(tmp_path / "part.jsonl")
    assert parts == ["a" * 5 + "b" * 5, "c", "d" * 100]


@pytest.mark.parametrize(
    ("bits", "verdict"),
    [
        (1.5, "The model beats gzip: 25 % fewer bits."),
        (2.5, "gzip is ahead: the model needs more time, e.g. make demo BUDGET=600."),
    ],
)
def test_the_verdict_follows_the_figures(
    bits: float, verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.report(bits, 2.0, 600)
    said = capsys.readouterr().out
    assert verdict in said
    assert f"this model       {bits:.3f}" in said and "gzip -9          2.000" in said


def test_a_step_that_fails_ends_the_demo_with_its_exit_code() -> None:
    with pytest.raises(demo.Stopped) as stopped:
        demo.tinyllama("evaluate", "--model", "no-such-folder", "--data", "x", capture=True)
    assert stopped.value.args == (2,)


def test_smoothing_keeps_a_constant_and_follows_a_step() -> None:
    assert plot.smoothed([3.0, 3.0, 3.0], 0.1) == pytest.approx([3, 3, 3])
    assert plot.smoothed([4.0, 2.0], 0.5) == pytest.approx([4, (0.5 * 4 * 0.5 + 1) / 0.75])


def test_reference_is_drawn_at_the_loss_that_is_as_good() -> None:
    reference = plot.Reference("gzip -9", 1.9, 0.475)
    assert reference.loss == pytest.approx(4)


def test_a_run_becomes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in metrics(20))
    (tmp_path / "metrics.jsonl").write_text(lines)
    out = tmp_path / "loss.png"
    assert plot_loss.main([str(tmp_path), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(PNG)
    reference = plot.Reference("gzip -9", 1.9, 0.475)
    plot.draw(metrics(20), tmp_path / "with.png", "title", reference)
    assert (tmp_path / "with.png").read_bytes() != out.read_bytes()


def test_a_folder_without_steps_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert plot_loss.main([str(tmp_path), "--out", str(tmp_path / "loss.png")]) == 2
    assert "metrics.jsonl: holds no step" in capsys.readouterr().err
