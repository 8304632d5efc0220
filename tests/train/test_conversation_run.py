"""Training and evaluation on conversations: masked, packed or not, resumed, with their template."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_helpers import small_tokenizer
from model_helpers import SQUARE, build
from runs_helpers import configuration, metrics, train, trainer

from tinyllama.data.batches import layout_of, prepare
from tinyllama.data.conversations import Form
from tinyllama.errors import DataError
from tinyllama.reports.runs import read_run
from tinyllama.tokenizers.opening import open_tokenizer
from tinyllama.train.evaluate import Evaluator

CONTEXT = 96


def write_chats(path: Path, count: int, seed: int = 0) -> Path:
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        turns = [
            {"role": "user", "content": f"What is {number}?"},
            {"role": "assistant", "content": "a b c "[: draw.integers(1, 6)] * 3},
        ]
        rows.append({"messages": turns * int(draw.integers(1, 3))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_loss_of_packed_conversations_is_that_of_each_alone(tmp_path):
    path = write_chats(tmp_path / "a.jsonl", 12)
    data = prepare(
        str(path), small_tokenizer(), tmp_path / "c", form=Form("chatml"), progress=False
    )
    config = replace(SQUARE, vocab_size=300, max_seq_len=256)
    packed = Evaluator(build(config), data, 256, 2)
    alone = layout_of(data, 256, pack=False)
    total, tokens = 0.0, 0
    for row in range(0, alone.n_rows, 2):
        batch = alone.batch(np.arange(row, min(row + 2, alone.n_rows)), 2)
        total += float(packed._summed_loss(*packed._inputs(*batch)).item())
        tokens += int((batch.targets >= 0).sum())
    result = packed.run()
    assert layout_of(data, 256).n_rows < alone.n_rows == 12
    assert data.trained is not None
    assert result.tokens == tokens == int(data.trained.sum())
    assert result.loss == pytest.approx(total / tokens, rel=1e-6)


def options(tmp_path: Path, *more: str) -> list[str]:
    sizes = ["model.max_seq_len=96", "data.context_length=96", "training.batch_size=4"]
    return [f"data.train_path={write_chats(tmp_path / 'chat.jsonl', 60)}", *sizes,
            "data.template=chatml", "data.val_fraction=0.2", *more]  # fmt: skip


@pytest.mark.parametrize("pack", ["true", "false"])
def test_a_run_on_conversations_resumes_bit_for_bit_and_saves_its_template(tmp_path, pack):
    words = options(tmp_path, f"data.pack={pack}", "training.max_steps=4")
    whole = configuration(tmp_path / "whole", *words)
    train(whole)
    half = configuration(tmp_path / "half", *words, "checkpointing.save_every=2")
    train(half)
    again = trainer(half, resume=tmp_path / "half" / "step-00000002").run()
    assert again.finished
    one, two = metrics(tmp_path / "whole"), metrics(tmp_path / "half")
    assert [row["loss"] for row in one.values()] == [row["loss"] for row in two.values()]
    assert "val_loss" in one[4]
    template = open_tokenizer(tmp_path / "half" / "final").chat_template
    assert template is not None and "<|im_start|>" in template and "generation %" not in template


def test_a_run_says_what_it_cuts_and_leaves_out(tmp_path):
    config = configuration(tmp_path / "run", *options(tmp_path, "data.context_length=64"))
    lines = [line for line in trainer(config).notices() if "conversations" in line]
    assert any("are longer than 64 tokens: their ends are cut off" in line for line in lines)
    with pytest.raises(DataError, match="holds text, in which nobody speaks"):
        trainer(configuration(tmp_path / "other", "data.train_on=last"))


def test_lines_of_metrics_say_how_many_tokens_their_steps_trained(tmp_path):
    config = configuration(tmp_path / "run", *options(tmp_path, "training.num_epochs=1"))
    batches = trainer(config).batches
    trained = [int((batches.next().targets >= 0).sum()) for _ in range(batches.steps_per_epoch)]
    train(config)
    lines = metrics(tmp_path / "run").values()
    assert [line["trained_tokens"] for line in lines] == trained
    assert len(set(trained)) > 1
    columns = read_run(tmp_path / "run").columns
    seconds = [line["trained_tokens"] / line["tokens_per_second"] for line in lines]
    assert columns["step_seconds"] == pytest.approx(seconds)
