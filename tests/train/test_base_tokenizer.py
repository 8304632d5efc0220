"""A base is trained with its own tokenizer: another would break a fine-tune without a word."""

import shutil
from dataclasses import replace

import pytest
from data_helpers import LINE, small_tokenizer
from lora_helpers import run_config, write_base, write_text
from runs_helpers import cli

from tinyllama.convert.merge import merge
from tinyllama.errors import ConfigError, WeightsError
from tinyllama.formats.peft import AdapterFolder
from tinyllama.formats.safetensors import SafetensorsFile, write_safetensors
from tinyllama.tokenizers.files import MODEL_FILE
from tinyllama.tokenizers.opening import open_tokenizer
from tinyllama.tokenizers.sentencepiece import train_tokenizer
from tinyllama.train.prepare import find_tokenizer, supported, with_base
from tinyllama.train.trainer import Trainer

OTHER_TEXT = "Wholly different words, which give pieces that no base has seen.\n"


@pytest.fixture
def base(tmp_path):
    write_text(tmp_path)
    return write_base(tmp_path / "base")


def other_tokenizer(folder):
    return train_tokenizer([OTHER_TEXT * 20], 300, folder / "other" / MODEL_FILE)


def whole(folder, base, *overrides):
    """A configuration that trains the whole base."""
    return with_base(replace(run_config(folder, base, *overrides), lora=None))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_another_tokenizer_than_the_bases_is_refused(base, tmp_path, kind):
    other_tokenizer(tmp_path)
    override = f"data.tokenizer={tmp_path}/other"
    config = with_base(run_config(tmp_path, base, override))
    if kind == "full":
        config = replace(config, lora=None)
    with pytest.raises(ConfigError) as caught:
        Trainer(config, show=False)
    message = str(caught.value)
    assert message.startswith(f"--set {override}: got a tokenizer ({tmp_path}/other) whose pieces ")
    assert f"differ from those of model.base ({base}), must be the base's own" in message
    assert "set data.replace_tokenizer = true" in message


def test_a_tokenizer_made_from_another_text_is_refused_on_the_command_line(base, tmp_path, capsys):
    """What configs/demo.toml with a model.base came to."""
    (tmp_path / "train.txt").write_text(OTHER_TEXT * 40)
    config = run_config(tmp_path, base, "data.tokenizer=train", "data.tokenizer_vocab_size=300")
    (tmp_path / "run.toml").write_text(with_base(config).to_toml())
    assert cli("train", tmp_path / "run.toml", "--quiet") == 2
    assert "data.tokenizer: got a tokenizer (train) whose pieces or" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_same_pieces_from_another_place_are_accepted(base, tmp_path):
    """Compared by what they hold: a copy, and one made from the same text once more."""
    shutil.copy(base / MODEL_FILE, tmp_path / "copy.model")
    (tmp_path / "train.txt").write_text(LINE * 20)
    for chosen in (f"data.tokenizer={tmp_path}/copy.model", "data.tokenizer=train"):
        config = whole(tmp_path, base, chosen, "data.tokenizer_vocab_size=300")
        found = find_tokenizer(config, None, False)
        assert found.vocabulary_digest == small_tokenizer().vocabulary_digest


def test_the_same_pieces_with_other_ids_are_another_vocabulary(tmp_path):
    first, second = (
        train_tokenizer([text * 20], 268) for text in ("ab ab cd cd cd\n", "cd cd ab ab ab\n")
    )
    pieces = [sorted(tokenizer.pieces) for tokenizer in (first, second)]
    assert pieces[0] == pieces[1] and first.pieces != second.pieces
    assert first.vocabulary_digest != second.vocabulary_digest


def test_a_base_without_a_tokenizer_takes_the_one_that_is_named(base, tmp_path):
    other = other_tokenizer(tmp_path)
    (base / MODEL_FILE).unlink()
    config = whole(tmp_path, base, f"data.tokenizer={tmp_path}/other")
    assert find_tokenizer(config, None, False).model == other.model


def test_a_tokenizer_is_replaced_where_that_is_wanted_and_goes_on_after_a_stop(base, tmp_path):
    other = other_tokenizer(tmp_path)
    (tmp_path / "train.txt").write_text(OTHER_TEXT * 100)
    wanted = [f"data.tokenizer={tmp_path}/other", "data.replace_tokenizer=true"]
    final = Trainer(whole(tmp_path, base, *wanted), show=False).run().checkpoint
    assert open_tokenizer(final).model == other.model
    config = whole(tmp_path, base, *wanted, "training.max_steps=5")
    assert Trainer(config, resume=final, show=False).run().step == 5


def test_adapters_cannot_replace_a_tokenizer(base, tmp_path):
    config = run_config(tmp_path, base, "data.replace_tokenizer=true")
    with pytest.raises(ConfigError) as caught:
        supported(config)
    assert str(caught.value).startswith(
        "--set data.replace_tokenizer=true: got true, must be false with [lora]: adapters leave"
    )
    assert supported(replace(config, lora=None)).data.replace_tokenizer


def test_adapters_carry_their_vocabulary_and_merge_compares_it(base, tmp_path):
    final = Trainer(with_base(run_config(tmp_path, base)), show=False).run().checkpoint
    adapter = AdapterFolder(final)
    assert adapter.tokenizer_digest == small_tokenizer().vocabulary_digest
    assert merge(base, [(final, 1.0)], tmp_path / "merged").changed == 4
    other = other_tokenizer(tmp_path)
    shutil.copy(tmp_path / "other" / MODEL_FILE, base / MODEL_FILE)
    with pytest.raises(WeightsError) as caught:
        merge(base, [(final, 1.0)], tmp_path / "again")
    assert str(caught.value).startswith(
        f"{final}: was trained with a tokenizer (vocabulary {adapter.tokenizer_digest[:12]}) that "
        f"is not the one of {base} (vocabulary {other.vocabulary_digest[:12]})"
    )
    assert not (tmp_path / "again").exists()
    (base / MODEL_FILE).unlink()  # nothing to compare with
    assert merge(base, [(final, 1.0)], tmp_path / "again").changed == 4


def test_adapters_without_a_vocabulary_are_merged(base, tmp_path):
    """PEFT's have none, nor those of earlier versions."""
    final = Trainer(with_base(run_config(tmp_path, base)), show=False).run().checkpoint
    file = final / "adapter_model.safetensors"
    opened = SafetensorsFile(file)
    tensors = {name: opened.float32(name).copy() for name in opened.names}
    write_safetensors(file, tensors, {"format": "pt"})
    (final / "manifest.json").unlink()  # whose sums are those of the file before
    other_tokenizer(tmp_path)
    shutil.copy(tmp_path / "other" / MODEL_FILE, base / MODEL_FILE)
    assert merge(base, [(final, 1.0)], tmp_path / "merged").changed == 4
