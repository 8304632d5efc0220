"""Evaluation: the loss is the model's own, over every token once, however it is cut."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_helpers import load, small_tokenizer, write
from lora_helpers import write_base
from model_helpers import SQUARE, build, random_weights, reference_loss
from runs_helpers import VAL_FILES, cli, config_file, finished_run, metrics, shared_folder
from tinygrad import Tensor

from tinyllama.convert.merge import merge
from tinyllama.data.batches import sequential
from tinyllama.errors import CheckpointError
from tinyllama.system import checked
from tinyllama.train.evaluate import Evaluator
from tinyllama.train.manifest import read_manifest, verify_tokenizer, write_manifest

CONFIG = replace(SQUARE, vocab_size=300)
CONTEXT = 16


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Three documents of real text, the second within a window."""
    monkeypatch.chdir(tmp_path)
    text = Path(VAL_FILES[0]).read_text()
    write("text.jsonl", [text[:61], text[61:66], text[66:150]])
    return load(small_tokenizer(), "text.jsonl")


def test_the_loss_is_that_of_the_formula_over_documents(texts):
    result = Evaluator(build(CONFIG), texts, CONTEXT, 2).run()
    weights = random_weights(CONFIG)
    batches = list(sequential(texts, CONTEXT, 2))
    summed = sum(reference_loss(weights, CONFIG, batch) for batch in batches)
    assert result.tokens == texts.n_tokens - 3  # of a document's last token nothing is predicted
    assert result.loss == pytest.approx(summed / result.tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    bits = summed / math.log(2) / texts.text_bytes
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-5)
    assert texts.text_bytes == 150


def test_the_loss_is_that_of_the_logits_of_a_single_document(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("one.txt", Path(VAL_FILES[0]).read_text()[:150])
    data, model = load(small_tokenizer(), "one.txt"), build(CONFIG)
    (batch,) = sequential(data, CONTEXT, data.window_count(CONTEXT))
    logits = model(Tensor(batch.tokens)).numpy().astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, np.maximum(batch.targets, 0)[..., None], -1)[..., 0]
    expected = -picked[batch.targets >= 0].mean()
    assert Evaluator(model, data, CONTEXT, 1).run().loss == pytest.approx(expected, rel=1e-5)


def test_the_loss_does_not_depend_on_the_batch_size(texts):
    most = texts.window_count(CONTEXT) - 1  # the second batch holds one window, and padding
    one, many = (Evaluator(build(CONFIG), texts, CONTEXT, size).run() for size in (1, most))
    assert most > 3 and one.tokens == many.tokens
    assert one.loss == pytest.approx(many.loss, rel=1e-6)


def test_an_evaluator_serves_again_and_sees_new_weights(texts):
    model = build(CONFIG)
    evaluator = Evaluator(model, texts, CONTEXT, 2)
    first = evaluator.run()
    assert evaluator.run() == first
    weight = model.lm_head.weight
    weight.assign(weight * 0).realize()
    assert evaluator.run().loss == pytest.approx(math.log(300), rel=1e-6)


def test_a_hopeless_model_has_infinite_perplexity(texts, monkeypatch):
    evaluator = Evaluator(build(CONFIG), texts, CONTEXT, 2)
    monkeypatch.setattr(evaluator, "_summed_loss", lambda *_: Tensor([1e6]))
    assert evaluator.run().perplexity == math.inf


def test_the_command_prints_json_that_equals_the_run_s_validation(capsys):
    run = finished_run()
    words = ["evaluate", "--model", run / "final", "--data", *VAL_FILES, "--batch", 12]
    assert cli(*words, "--cache-dir", shared_folder() / "cache") == 0
    out, err = capsys.readouterr()
    assert err.startswith("backend CPU, ")
    found = json.loads(out)
    assert set(found) == {"loss", "perplexity", "bits_per_byte", "tokens"}
    last = list(metrics(run).values())[-1]
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    summed_bits = found["loss"] * found["tokens"] / math.log(2)
    text_bytes = len(Path(VAL_FILES[0]).read_bytes())
    assert found["bits_per_byte"] == pytest.approx(summed_bits / text_bytes)


def test_a_context_that_the_model_does_not_have_is_refused(capsys):
    words = ["evaluate", "--model", finished_run() / "final", "--data", *VAL_FILES]
    assert cli(*words, "--context", 49) == 2
    assert "--context: got 49, must be at most the model's 48" in capsys.readouterr().err


def test_a_shorter_stride_predicts_the_same_tokens_each_from_more_text(texts):
    model = build(CONFIG)
    apart, overlapping = (
        Evaluator(model, texts, CONTEXT, 2, stride).run() for stride in (None, CONTEXT // 4)
    )
    assert overlapping.tokens == apart.tokens
    whole = Evaluator(model, texts, texts.n_tokens, 1).run()
    assert abs(overlapping.loss - whole.loss) < abs(apart.loss - whole.loss)


def test_a_stride_that_would_leave_tokens_out_is_refused(capsys):
    words = ["evaluate", "--model", finished_run() / "final", "--data", *VAL_FILES]
    assert cli(*words, "--context", 24, "--stride", 25) == 2
    assert "--stride: got 25, must be at most the context, 24" in capsys.readouterr().err


def damaged_copy(folder, name, place=-9):
    """The folder of a checkpoint in which one bit of a file is another one."""
    shutil.copytree(finished_run() / "final", folder)
    data = bytearray((folder / name).read_bytes())
    data[place] ^= 1
    (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "config.json"])
@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_checkpoint_with_a_flipped_bit_is_refused_before_a_result(
    tmp_path, capsys, command, name
):
    folder = damaged_copy(tmp_path / "model", name)
    words = {"evaluate": ["--data", *VAL_FILES], "generate": ["--max-new-tokens", 2]}
    assert cli(command, "--model", folder, *words[command]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert f"{folder / name}: changed: SHA-256 is " in lines[-2]
    assert lines[-1].startswith(f"{folder}: not loaded: ")
    (folder / "manifest.json").unlink()  # then it is a model of somebody else's
    if name == "model.safetensors":
        assert cli(command, "--model", folder, *words[command]) == 0


@pytest.mark.parametrize("named", ["folder", "file"])
def test_a_tokenizer_of_ours_with_a_flipped_bit_is_refused(tmp_path, capsys, named):
    """Also where its folder is named for the tokenizer alone."""
    folder = damaged_copy(tmp_path / "model", "tokenizer.model", 300)
    place = folder if named == "folder" else folder / "tokenizer.model"
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    toml = config_file(tmp_path / "run")
    for words in (
        ["train", toml, "--set", f"data.tokenizer={place}"],
        ["inspect", tmp_path / "rows.jsonl", "--model", place],
    ):
        assert cli(*words) == 2
        assert f"{folder / 'tokenizer.model'}: changed: SHA-256 is" in capsys.readouterr().err


def test_a_manifest_of_another_program_beside_a_tokenizer_has_no_sums_of_it(tmp_path):
    """A folder may be that of a page, whose manifest.json browsers read."""
    (tmp_path / "manifest.json").write_text('{"name": "page", "start_url": "/"}')
    verify_tokenizer(tmp_path)
    verify_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "manifest.json").write_text('{"format": "tinyllama-checkpoint-9"}')
    with pytest.raises(CheckpointError, match="must be tinyllama-checkpoint-1"):
        verify_tokenizer(tmp_path)


def test_a_check_that_is_remembered_serves_evaluating_but_not_merging_or_exporting(
    tmp_path, capsys, monkeypatch
):
    """As where a disk changes a byte and none of the file's dates."""
    folder = damaged_copy(tmp_path / "model", "model.safetensors")
    sums = dict(read_manifest(folder))

    def remembered(kind, paths, take):
        name = paths[0].name
        return sums[name][0] if kind == "sha256" and name in sums else take()

    monkeypatch.setattr(checked, "digest", remembered)
    assert cli("evaluate", "--model", folder, "--data", *VAL_FILES) == 0
    capsys.readouterr()
    assert cli("export", folder, tmp_path / "out") == 2
    assert "model.safetensors: changed: SHA-256 is" in capsys.readouterr().err
    base = write_base(tmp_path / "base")
    data = bytearray((base / "model.safetensors").read_bytes())
    write_manifest(base, {})
    data[-9] ^= 1
    (base / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed"):
        merge(base, [], tmp_path / "merged")
    assert not (tmp_path / "out").exists() and not (tmp_path / "merged").exists()


def test_damage_of_what_only_training_reads_keeps_nobody_from_evaluating(tmp_path, capsys):
    folder = damaged_copy(tmp_path / "model", "optimizer.safetensors")
    assert cli("evaluate", "--model", folder, "--data", *VAL_FILES) == 0
