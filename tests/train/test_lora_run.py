"""A LoRA run: what it saves, what it leaves alone, how it resumes, what it refuses."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
from data_helpers import LINE, small_tokenizer
from lora_helpers import (
    BASE,
    run_config,
    write_base,
    write_text,
)
from model_helpers import (
    random_batch,
)
from runs_helpers import cli, configuration, finished_run
from tinygrad import Tensor

from tinyllama.cli.app import main
from tinyllama.data.corpus import prepare
from tinyllama.errors import CheckpointError, ConfigError, WeightsError
from tinyllama.formats.peft import AdapterFolder, Placement
from tinyllama.formats.safetensors import SafetensorsFile
from tinyllama.generate.generator import Generator
from tinyllama.model.build import load_model
from tinyllama.model.llama import Llama
from tinyllama.model.lora import adapter_tensors
from tinyllama.observe.metrics import read_metrics
from tinyllama.runtime.storage import read
from tinyllama.train.evaluate import Evaluator
from tinyllama.train.prepare import with_base
from tinyllama.train.trainer import Trainer

QV = ("q_proj", "v_proj")


def copied(tensors):
    return {name: read(tensor).copy() for name, tensor in tensors.items()}


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


class Run:
    """A finished run, and what its base was before it."""

    def __init__(self, folder):
        self.folder, self.base = folder, write_base(folder / "base")
        write_text(folder)
        self.before = digests(self.base)
        self.config = with_base(run_config(folder, self.base))
        self.trainer = Trainer(self.config, show=False)
        self.summary = self.trainer.summary()
        self.final = self.trainer.run().checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("lora"))


@pytest.mark.parametrize("kind", ["full", "LoRA with dropout", "QLoRA"])
def test_recomputed_activations_give_the_same_losses(kind, tmp_path):
    found = []
    for recomputed in ("false", "true"):
        folder = tmp_path / recomputed
        write_base(folder / "base")
        write_text(folder)
        chosen = [f"training.checkpoint_activations={recomputed}"]
        chosen += ["qlora.block_size=16"] if kind == "QLoRA" else []
        config = with_base(run_config(folder, folder / "base", *chosen))
        trainer = Trainer(replace(config, lora=None) if kind == "full" else config, show=False)
        assert trainer.model.checkpoint_activations == (recomputed == "true")
        trainer.run()
        found.append([row["loss"] for row in read_metrics(folder / "run" / "metrics.jsonl")])
    assert len(found[0]) == 4 and found[0][-1] < found[0][0]
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_a_run_saves_adapters_alone_and_leaves_its_base_as_it_was(run):
    assert digests(run.base) == run.before
    assert {p.name for p in run.final.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "optimizer.safetensors",
        "training_state.json",
        "manifest.json",
    }
    pairs = 2 * BASE.num_layers
    assert len(SafetensorsFile(run.final / "adapter_model.safetensors").names) == 2 * pairs
    assert len(SafetensorsFile(run.final / "optimizer.safetensors").names) == 4 * pairs
    assert run.summary.startswith(f"{pairs * 4 * 64:,} adapter parameters on ")
    config = json.loads((run.final / "adapter_config.json").read_text())
    named = ("r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path")
    assert [config[key] for key in named] == [4, 8.0, 0.25, list(QV), "../../base"]
    lines = [
        json.loads(x) for x in (run.folder / "run" / "metrics.jsonl").read_text().split("\n")[:-1]
    ]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_resume_is_bitwise_identical(run, tmp_path):
    config = with_base(
        run_config(run.folder, run.base, f"checkpointing.checkpoint_dir={tmp_path}/run")
    )
    resumed = Trainer(config, resume=run.folder / "run" / "step-00000002", show=False)
    assert resumed.step == 2
    final = resumed.run().checkpoint
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "training_state.json"):
        assert (final / name).read_bytes() == (run.final / name).read_bytes(), name


def test_the_saved_adapter_loads_with_its_base_and_gives_the_logits_of_the_run(run):
    tokens = Tensor(random_batch(BASE).tokens).realize()
    trained = run.trainer.model(tokens).numpy()
    assert (load_model(run.final)(tokens).numpy() == trained).all()
    model = Llama.from_pretrained(run.base)
    assert (model(tokens).numpy() != trained).any()
    assert AdapterFolder(run.final).config(BASE).placed == run.trainer.adapter.placed


def test_a_project_that_is_moved_whole_keeps_its_adapters(run, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(run.folder, moved)
    assert AdapterFolder(moved / "run" / "final").base_folder() == (moved / "base").resolve()
    tokens = Tensor(random_batch(BASE).tokens).realize()
    found = load_model(moved / "run" / "final")(tokens).numpy()
    assert (found == run.trainer.model(tokens).numpy()).all()


def test_generate_takes_an_adapters_folder(run, capsys, monkeypatch):
    seen = []
    make = Generator.__init__

    def noting(self, model, *arguments):
        seen.append(copied(adapter_tensors(model)).keys())
        make(self, model, *arguments)

    monkeypatch.setattr(Generator, "__init__", noting)
    words = ["--prompt", "def", "--max-new-tokens", "1", "--temperature", "0"]
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", str(run.final), *words])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("def")
    assert seen == [run.trainer.optimizer.parameters.keys()]


def test_evaluate_takes_an_adapters_folder_with_the_tokenizer_of_its_base(run, capsys, tmp_path):
    theirs = run.folder / "run" / "theirs"  # PEFT's folders have no tokenizer
    shutil.copytree(run.final, theirs, ignore=shutil.ignore_patterns("tokenizer.model"))
    text = tmp_path / "held.txt"
    text.write_text(LINE * 20)
    words = ["--model", theirs, "--data", text, "--context", 32, "--cache-dir", tmp_path / "c"]
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *map(str, words)])
    assert ended.value.code == 0
    dataset = prepare([str(text)], small_tokenizer(), tmp_path / "d", progress=False)
    expected = Evaluator(run.trainer.model, dataset, 32, 1).run()
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected._asdict())


def test_an_adapter_whose_base_has_moved_takes_its_place_by_option(run, capsys, tmp_path):
    moved, here = tmp_path / "moved", tmp_path / "run"
    shutil.copytree(run.final, here / "step-00000002")  # found by the name of its run
    (tmp_path / "held.txt").write_text(LINE * 20)
    words = ["evaluate", "--model", here, "--data", tmp_path / "held.txt", "--context", 32]
    words += ["--cache-dir", tmp_path / "cache"]
    assert cli("evaluate", "--model", run.final, *words[3:]) == 0
    expected = capsys.readouterr().out
    run.base.rename(moved)
    try:
        assert cli(*words) == 2
        assert "base_model_name_or_path: got" in capsys.readouterr().err
        assert cli(*words, "--base", moved) == 0
        out, err = capsys.readouterr()
    finally:
        shutil.copytree(moved, run.base)
    assert out == expected
    assert err.startswith(f"{here} is a run: step-00000002 is used\n")
    assert cli("evaluate", "--model", moved, *words[3:], "--base", moved) == 2
    assert f"--base: got {moved}, must be left out: {moved} holds" in capsys.readouterr().err


def test_overrides_reach_rank_alpha_and_layers(run):
    overrides = ("lora.rank=16", "lora.alpha=32", "lora.target_modules=all-linear")
    config = with_base(run_config(run.folder, run.base, *overrides, "lora.use_rslora=true"))
    adapter = Trainer(config, show=False).adapter
    assert set(adapter.placed.values()) == {Placement(16, 32.0)}
    assert len(adapter.placed) == 7 * BASE.num_layers
    assert {adapter.scale(path) for path in adapter.placed} == {32 / 4}


def error(kind, *arguments, **options):
    with pytest.raises(kind) as caught:
        Trainer(*arguments, show=False, **options)
    return str(caught.value)


def test_without_a_base_adapters_are_refused():
    config = run_config("unused", "unused")
    message = error(ConfigError, replace(config, model=replace(config.model, base=None)))
    assert message.startswith("[lora]: adapters are trained on a checkpoint: name its folder")


def test_resuming_with_other_adapters_is_refused_by_what_is_saved(run):
    config = with_base(run_config(run.folder, run.base, "lora.rank=8"))
    message = error(ConfigError, config, resume=run.final)
    saved = "rank 4, alpha 8 on q_proj, v_proj is saved there"
    assert message == f"[lora] differs from {run.final}: {saved}"


def test_resuming_on_another_base_is_refused_by_its_fingerprint(run, tmp_path):
    other = write_base(tmp_path / "other", seed=9)
    config = with_base(run_config(run.folder, other))
    message = error(WeightsError, config, resume=run.final)
    assert message.startswith(f"{run.final}: was made for another base ({run.base}, fingerprint ")
    assert f"than {other} (fingerprint " in message


def test_a_base_of_ours_with_a_flipped_bit_is_refused_at_the_start(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(finished_run() / "final", base)
    data = bytearray((base / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (base / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.base: .*model\.safetensors: changed"):
        with_base(configuration(tmp_path / "run", f"model.base={base}"))


def test_a_rope_base_that_the_adapter_could_not_carry_is_refused(run):
    config = with_base(run_config(run.folder, run.base, "model.rope_theta=500.0"))
    message = error(ConfigError, config)
    assert message.startswith("--set model.rope_theta=500.0: got 500.0, must be 10000.0 as in ")
    assert message.endswith(f"{run.base}/config.json")
