"""A base's tokenizer files travel with every checkpoint, adapter and merge; its special tokens are
single ids in rows, and each of its ends stops generation."""

import json
from dataclasses import replace

import numpy as np
import pytest
from gguf_helpers import CONFIG as GGUF_CONFIG
from gguf_helpers import write_gguf
from lora_helpers import BASE, run_config, write_base
from model_helpers import random_weights
from runs_helpers import cli
from texts_helpers import lines
from tokenizers_helpers import (
    CHATML_CONFIG,
    byte_level,
    byte_level_files,
    chatml_files,
    reference,
    spm,
)

from tinyllama.convert.merge import merge
from tinyllama.data.batches import prepare
from tinyllama.data.corpus import TokenDataset
from tinyllama.data.layout import Windows
from tinyllama.formats.huggingface import save_folder
from tinyllama.tokenizers.opening import from_files, open_tokenizer
from tinyllama.train.prepare import with_base
from tinyllama.train.trainer import Trainer

TURNS = "<|im_start|>user\nadd {0} and {1}<|im_end|>\n<|im_start|>assistant\n{0}{1}<|im_end|>\n"
ROWS = [TURNS.format(first, second) for first in range(9) for second in range(9)]


def write_rows(folder):
    text = "".join(json.dumps({"text": row}) + "\n" for row in ROWS)
    (folder / "train.jsonl").write_text(text)


def write_chat_base(folder, files, **others):
    """A base with random weights, one row of the embedding for each token, and these files."""
    tokenizer = from_files(files, "t")
    config = replace(BASE, vocab_size=tokenizer.vocab_size)
    save_folder(
        folder, config, random_weights(config, 0), dtype="float32", files=files,
        bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_ids,
    )  # fmt: skip
    for name, data in others.items():
        (folder / name).write_bytes(data)
    return folder


def config_of(folder, base, *overrides, lora=True):
    rows = f"data.train_path={folder}/train.jsonl"
    config = with_base(run_config(folder, base, rows, "data.context_length=64", *overrides))
    return config if lora else replace(config, lora=None)


KINDS = {"tokenizer.model": chatml_files, "tokenizer.json": byte_level_files}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [True, False], ids=["adapters", "the whole model"])
def test_the_files_of_a_base_are_those_of_its_checkpoints(kind, lora, tmp_path):
    files = KINDS[kind]() | {"chat_template.jinja": b"{{ messages }} of a file"}
    write_rows(tmp_path)
    base = write_chat_base(tmp_path / "base", files)
    given = {name: (base / name).read_bytes() for name in files}
    final = Trainer(config_of(tmp_path, base, lora=lora), show=False).run().checkpoint
    own, found = open_tokenizer(base), open_tokenizer(final)
    changed = {"tokenizer_config.json"} if kind == "tokenizer.model" else set()
    for name in given.keys() - changed:
        assert (final / name).read_bytes() == given[name], name
    assert found.chat_template == "{{ messages }} of a file"
    assert (found.fingerprint, found.eos_ids) == (own.fingerprint, own.eos_ids)
    assert (final / "tokenizer.json").is_file()
    before, after = (json.loads((f / "tokenizer_config.json").read_text()) for f in (base, final))
    kept = {key: after[key] for key in before if key != "tokenizer_class"}
    assert kept == {key: before[key] for key in kept}
    assert after["tokenizer_class"] == "PreTrainedTokenizerFast"
    config = config_of(tmp_path, base, "training.max_steps=6", lora=lora)
    assert Trainer(config, resume=final, show=False).run().step == 6
    if lora:
        merge(base, [(final, 1.0)], tmp_path / "merged")
        merged = {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()}
        assert {name: merged[name] for name in own.files} == own.files


def test_every_end_of_generation_config_stops_and_is_kept(tmp_path, capsys):
    """The model says the end of a turn after every word, and that is not the end of a text."""
    model = spm("control symbols")
    turn = reference(model).piece_to_id("<|im_end|>")
    config = replace(BASE, vocab_size=400, num_layers=1)
    weights = {name: 0 * array for name, array in random_weights(config, 0).items()}
    weights["model.norm.weight"] += 1
    weights["model.embed_tokens.weight"][:, 0] = 4
    weights["lm_head.weight"][turn, 0] = 10
    ends = json.dumps({"bos_token_id": 1, "eos_token_id": [2, turn]}).encode()
    for name, files in {
        "both": {"tokenizer.model": model, "generation_config.json": ends},
        "one": {"tokenizer.model": model},
    }.items():
        save_folder(
            tmp_path / name, config, weights, dtype="float32", files=files, bos_id=1, eos_id=2
        )
        words = ["--prompt", "a", "--max-new-tokens", "5", "--temperature", "0"]
        assert cli("generate", "--model", tmp_path / name, *words) == 0
        assert capsys.readouterr().out == "a\n"
    assert open_tokenizer(tmp_path / "both").eos_ids == (2, turn)
    assert open_tokenizer(tmp_path / "one").eos_ids == (2,)
    # Where only config.json lists them, they are found there.
    (tmp_path / "both" / "generation_config.json").unlink()
    values = json.loads((tmp_path / "both" / "config.json").read_text())
    (tmp_path / "both" / "config.json").write_text(json.dumps(values | {"eos_token_id": [2, turn]}))
    found = open_tokenizer(tmp_path / "both")
    assert found.eos_ids == (2, turn)
    assert json.loads(found.files["generation_config.json"])["eos_token_id"] == [2, turn]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_rows_are_single_ids_and_in_plain_texts_are_text(kind, tmp_path):
    tokenizer = from_files(KINDS[kind](), "t")
    write_rows(tmp_path)
    (tmp_path / "plain.txt").write_text("".join(ROWS))
    rows = prepare([f"{tmp_path}/train.jsonl"], tokenizer, tmp_path / "cache", progress=False)
    ids = [[*tokenizer.begin, *tokenizer.encode(r, special=True), tokenizer.eos_id] for r in ROWS]
    assert rows.tokens.tolist() == [number for row in ids for number in row]
    assert np.diff([*rows.starts, rows.n_tokens]).tolist() == [len(row) for row in ids]
    assert (rows.n_documents, rows.eos_id) == (len(ROWS), tokenizer.eos_id)
    assert rows.tokens.tolist().count(tokenizer.special_tokens["<|im_start|>"]) == 2 * len(ROWS)
    plain = prepare([f"{tmp_path}/plain.txt"], tokenizer, tmp_path / "cache", progress=False)
    assert tokenizer.special_tokens["<|im_start|>"] not in plain.tokens
    again = prepare([f"{tmp_path}/train.jsonl"], tokenizer, tmp_path / "cache", progress=False)
    assert again.starts.tolist() == rows.starts.tolist() and again.path == rows.path
    base = write_chat_base(tmp_path / "base", KINDS[kind]())
    trainer = Trainer(config_of(tmp_path, base, "data.special_tokens=false"), show=False)
    texts = [[*tokenizer.begin, *tokenizer.encode(row), tokenizer.eos_id] for row in ROWS]
    assert trainer.batches._dataset.tokens.tolist() == [n for row in texts for n in row]


def test_rows_are_texts_alone_where_the_tokenizer_has_no_markup(tmp_path):
    tokenizer = from_files({"tokenizer.model": spm()}, "t")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "<s>not special</s> <unk>"}) + "\n")
    dataset = prepare([f"{tmp_path}/a.jsonl"], tokenizer, tmp_path / "cache", progress=False)
    own = reference(spm()).encode("<s>not special</s> <unk>")
    assert dataset.tokens.tolist() == [1, *own, 2]


def test_documents_end_where_they_end_and_not_at_each_end_of_a_turn():
    """Begin and end may be tokens of a turn, and a tokenizer may put no begin before a text."""
    tokens, starts = np.array([5, 9, 6, 9, 7, 8, 9, 5, 6], np.uint16), np.array([0, 5, 7])
    dataset = TokenDataset("f", tokens, starts, 0, 9, 9, "f")
    batch = Windows(dataset, 4).batch(np.array([0, 1]), 3)
    assert batch.tokens.tolist() == [[5, 9, 6, 9], [7, 8, 9, 5], [9, 9, 9, 9]]
    assert batch.targets.tolist() == [[9, 6, 9, 7], [-1, 9, -1, 6], [-1, -1, -1, -1]]
    assert batch.starts.tolist() == [[0, 0, 0, 0], [0, 1, 1, 3], [0, 1, 2, 3]]


def test_a_cache_of_an_earlier_version_is_still_used(tmp_path):
    """It has no file of the places of documents: they begin with a BOS."""
    import msgspec

    from tinyllama.data import corpus

    tokenizer = from_files({"tokenizer.model": spm()}, "t")
    write_rows(tmp_path)
    made = prepare([f"{tmp_path}/train.jsonl"], tokenizer, tmp_path / "cache", progress=False)
    (made.path / "documents.bin").unlink()
    meta = msgspec.json.decode((made.path / "meta.json").read_bytes(), type=corpus._Meta)
    old = msgspec.structs.replace(meta, documents="")
    old.sum = old.summed()
    (made.path / "meta.json").write_bytes(msgspec.json.encode(old))
    assert b'documents":"' not in (made.path / "meta.json").read_bytes()
    changed = (made.path / "tokens.bin").stat().st_mtime_ns
    again = prepare([f"{tmp_path}/train.jsonl"], tokenizer, tmp_path / "cache", progress=False)
    assert again.starts.tolist() == made.starts.tolist()
    assert (again.path / "tokens.bin").stat().st_mtime_ns == changed


@pytest.mark.parametrize("damage", [b"", b"\xff" * 8, None], ids=["short", "past", "missing"])
def test_damaged_places_of_documents_are_made_again(damage, tmp_path, capsys):
    tokenizer = from_files(chatml_files(), "t")
    write_rows(tmp_path)
    made = prepare([f"{tmp_path}/train.jsonl"], tokenizer, tmp_path / "cache", progress=False)
    starts, file = made.starts.tolist(), made.path / "documents.bin"
    data = file.read_bytes()
    file.unlink()
    if damage is not None:
        file.write_bytes(data[: -len(damage) or 8] + damage)
    again = prepare([f"{tmp_path}/train.jsonl"], tokenizer, tmp_path / "cache", progress=False)
    assert again.starts.tolist() == starts
    assert "documents.bin: damaged" in capsys.readouterr().err


def test_a_model_with_more_rows_than_pieces_says_so(tmp_path, capsys):
    files = chatml_files()
    base = write_base(tmp_path / "base", replace(BASE, vocab_size=448))
    for name, data in files.items():
        (base / name).write_bytes(data)
    pieces = from_files(files, "t").vocab_size
    line = f"the model has 448 rows of embeddings and the tokenizer {pieces} pieces: the last"
    write_rows(tmp_path)
    trainer = Trainer(config_of(tmp_path, base), show=False)
    assert any(notice.startswith(line) for notice in trainer.notices())
    assert cli("generate", "--model", base, "--max-new-tokens", "1") == 0
    assert line in capsys.readouterr().err


def test_checkpoints_of_earlier_versions_are_resumed(tmp_path):
    """They hold a tokenizer.model and a tokenizer_config.json with constant names."""
    write_rows(tmp_path)
    base = write_base(tmp_path / "base")
    config = config_of(tmp_path, base, lora=False)
    final = Trainer(config, show=False).run().checkpoint
    for name in ("tokenizer.json", "manifest.json", "generation_config.json"):
        (final / name).unlink(missing_ok=True)
    old = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    old |= {"unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "legacy": False}
    (final / "tokenizer_config.json").write_text(json.dumps(old))
    config = config_of(tmp_path, base, "training.max_steps=6", lora=False)
    assert Trainer(config, resume=final, show=False).run().step == 6


def test_a_text_of_many_scripts_is_the_same_in_every_file_that_is_written():
    """A tokenizer made from what is written encodes as the one that it was written of."""
    for files in (chatml_files(), byte_level_files(), {"tokenizer.model": spm("Yi's")}):
        own = from_files(files, "t")
        again = from_files(own.files, "again")
        without = {name: data for name, data in own.files.items() if name != "tokenizer.model"}
        alone = from_files(without, "alone")
        assert again.fingerprint == own.fingerprint
        assert (alone.eos_ids, alone.begin, alone.bos_id) == (own.eos_ids, own.begin, own.bos_id)
        for line in lines():
            ids = own.encode(line)
            assert ids == again.encode(line) == alone.encode(line), line


def with_vocabulary(writer):
    """Give a GGUF file the vocabulary of `byte_level`, as SmolLM2's has it."""
    made = json.loads(byte_level())["model"]
    pieces = sorted(made["vocab"], key=made["vocab"].get)
    for key in ("tokens", "token_type"):
        writer.kv_data[-1].pop(f"tokenizer.ggml.{key}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([3] * 3 + [1] * (len(pieces) - 3))
    writer.add_token_merges([" ".join(pair) for pair in made["merges"]])
    writer.add_chat_template(CHATML_CONFIG["chat_template"])


def test_the_vocabulary_of_a_gguf_base_is_a_tokenizer_json_in_adapters_and_merges(tmp_path):
    own = from_files(byte_level_files(), "t")
    config = replace(GGUF_CONFIG, vocab_size=own.vocab_size)
    base = tmp_path / "base.gguf"
    write_gguf(base, "F32", config, change=with_vocabulary)
    write_rows(tmp_path)
    run = config_of(tmp_path, base, "data.context_length=32")
    final = Trainer(run, show=False).run().checkpoint
    merge(base, [(final, 1.0)], tmp_path / "merged")
    for folder in (final, tmp_path / "merged"):
        found = open_tokenizer(folder)
        assert found.fingerprint == open_tokenizer(base).fingerprint
        assert (found.eos_ids, found.chat_template) == ((2,), CHATML_CONFIG["chat_template"])
        assert [found.encode(line) for line in lines()] == [own.encode(line) for line in lines()]
