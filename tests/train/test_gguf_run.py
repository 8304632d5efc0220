"""QLoRA straight on a GGUF file: blocks as they are stored, resumed, loaded, merged."""

from dataclasses import replace

import numpy as np
import pytest
from data_helpers import small_tokenizer
from gguf_helpers import CONFIG, write_gguf
from lora_helpers import run_config, write_text
from model_helpers import random_batch
from tinygrad import Tensor, dtypes

from tinyllama.cli.app import main
from tinyllama.convert.merge import merge
from tinyllama.errors import ConfigError, WeightsError
from tinyllama.formats.gguf_blocks import PACKED_TYPES
from tinyllama.formats.packed import PackedForm
from tinyllama.model.build import build_random, load_model
from tinyllama.model.int4 import Int4Linear
from tinyllama.model.layers import block_linears, named_tensors
from tinyllama.model.llama import Llama
from tinyllama.model.lora import LoRALinear
from tinyllama.observe.metrics import read_metrics
from tinyllama.train.memory_estimate import lasting_bytes
from tinyllama.train.prepare import with_base
from tinyllama.train.trainer import Trainer

SIZES = replace(CONFIG, vocab_size=300)
KINDS = {"q_proj": "Q4_0", "gate_proj": "Q8_0", "down_proj": "Q6_K", "o_proj": "F16"}


def kind_of(name):
    return KINDS.get(name.split(".")[-2], "Q4_1")


def write_base(path, seed=0):
    """A file in which every kind of layer is stored in another way."""
    names = [f"model.layers.{n}.{part}.weight" for n in (0, 1) for part in PARTS]
    return write_gguf(path, "Q8_0", SIZES, seed, kinds={name: kind_of(name) for name in names})


PARTS = [f"self_attn.{letter}_proj" for letter in "qkvo"]
PARTS += [f"mlp.{word}_proj" for word in ("gate", "up", "down")]


def configured(folder, *overrides):
    (folder / "t.model").write_bytes(small_tokenizer().model)
    write_text(folder)
    given = (f"data.tokenizer={folder}/t.model", "qlora.block_size=64", "lora.dropout=0.0")
    return with_base(run_config(folder, folder / "base.gguf", *given, *overrides))


class Run:
    """A finished run on such a file."""

    def __init__(self, folder):
        self.folder = folder
        self.values = write_base(folder / "base.gguf")
        self.config = configured(folder)
        self.trainer = Trainer(self.config, show=False)
        self.final = self.trainer.run().checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("gguf-run"))


def bases(model):
    """Kind of layer -> the layers, without their adapters."""
    layers = {}
    for _, owner, name in block_linears(model.model.layers):
        layer = getattr(owner, name)
        layers.setdefault(name, []).append(layer.base if isinstance(layer, LoRALinear) else layer)
    return layers


def test_blocks_stay_as_they_are_and_the_rest_is_widened_or_packed(run):
    for name, layers in bases(run.trainer.model).items():
        kind = KINDS.get(name, "Q4_1")
        for number, layer in enumerate(layers):
            part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            value = run.values[f"model.layers.{number}.{part}.{name}.weight"]
            if kind == "F16":  # not quantised yet, so the configuration's groups
                assert layer.form == PackedForm(4, 64)
            elif kind == "Q6_K":
                assert layer.weight.dtype == dtypes.float32
            else:
                assert layer.form == PACKED_TYPES[kind]
            if kind != "F16":
                assert np.array_equal(layer.dense_weight().numpy(), value), name


def test_other_blocks_are_packed_only_if_asked(tmp_path):
    write_base(tmp_path / "base.gguf")
    trainer = Trainer(configured(tmp_path, "qlora.requantize=true"), show=False)
    layers = bases(trainer.model)
    assert {layer.form for layer in layers["down_proj"]} == {PackedForm(4, 64)}
    assert {layer.form for layer in layers["up_proj"]} == {PackedForm(4, 32, minima=True)}


def test_the_loss_falls_and_another_run_has_the_same_losses_to_the_bit(run, tmp_path):
    losses = [row["loss"] for row in read_metrics(run.folder / "run" / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    again = replace(
        run.config, checkpointing=replace(run.config.checkpointing, checkpoint_dir=f"{tmp_path}/r")
    )
    Trainer(again, show=False).run()
    assert [row["loss"] for row in read_metrics(tmp_path / "r" / "metrics.jsonl")] == losses


def test_resume_is_bitwise_identical(run, tmp_path):
    config = replace(
        run.config, checkpointing=replace(run.config.checkpointing, checkpoint_dir=f"{tmp_path}/r")
    )
    resumed = Trainer(config, resume=run.folder / "run" / "step-00000002", show=False)
    final = resumed.run().checkpoint
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "training_state.json"):
        assert (final / name).read_bytes() == (run.final / name).read_bytes(), name


def test_another_form_of_the_base_cannot_resume(run, tmp_path):
    config = replace(run.config, qlora=replace(run.config.qlora, requantize=True))
    with pytest.raises(ConfigError, match=r"\[qlora\] differs .* block_size 64, requantized"):
        Trainer(config, resume=run.folder / "run" / "step-00000002", show=False)


def test_the_adapter_loads_with_its_file_and_gives_the_logits_of_the_run(run):
    tokens = Tensor(random_batch(SIZES).tokens).realize()
    trained = run.trainer.model(tokens).numpy()
    assert (load_model(run.final)(tokens).numpy() == trained).all()


def test_an_adapter_of_another_file_is_refused(run, tmp_path):
    write_base(tmp_path / "other.gguf", seed=7)
    with pytest.raises(WeightsError, match=r"was made for another base .*base\.gguf"):
        load_model(run.final, base=tmp_path / "other.gguf")


@pytest.mark.parametrize("dtype", ["fp32", "keep"])
def test_merged_onto_its_file_it_computes_what_the_run_computed(run, tmp_path, dtype):
    done = merge(run.folder / "base.gguf", [(run.final, 1.0)], tmp_path / "out", dtype=dtype)
    assert (done.changed, done.total) == (4, len(run.values))
    # The embedding in bfloat16, and o_proj, which the run packed itself.
    assert {part.name.split(".")[-2] for part in done.lost} == {"embed_tokens", "o_proj"}
    tokens = Tensor(random_batch(SIZES).tokens).realize()
    trained = run.trainer.model(tokens).numpy()
    merged = Llama.from_pretrained(tmp_path / "out")
    allowed = 1e-5 if dtype == "fp32" else 1e-3  # o_proj returns to float16
    assert np.abs(merged(tokens).numpy() - trained).max() < allowed * np.abs(trained).max()
    assert merged.config == SIZES


def test_the_command_says_which_layers_are_as_the_file_holds_them(run, tmp_path, capsys):
    words = ["--base", str(run.folder / "base.gguf"), "--adapter", str(run.final)]
    with pytest.raises(SystemExit) as done:
        main(["merge", *words, "--out", str(tmp_path / "out")])
    assert done.value.code == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == (
        "the base's layers as its file holds them: 12; 2 in 4 bits, groups of 64 (embedding and"
        " head in bfloat16):"
    )


def test_random_weights_have_the_forms_of_the_file(run):
    layers = bases(build_random(run.config, seed=1).model)
    for name, (layer, _) in layers.items():
        dense = layer.dense_weight().numpy()
        assert 0.01 < dense.std() < 0.03 and abs(dense.mean()) < 0.003, name
        if name == "gate_proj":
            assert layer.form == PACKED_TYPES["Q8_0"]


def test_the_estimate_counts_the_bytes_that_are_held(run):
    held = {"weights": 0, "scales": 0, "adapters": 0}
    for name, tensor in named_tensors(run.trainer.model):
        kind = "adapters" if "lora_" in name else "weights"
        held["scales" if name.endswith(("scales", "minima")) else kind] += tensor.nbytes()
    counted = lasting_bytes(run.config)
    assert {name: counted[name] for name in held} == held
    layer = bases(run.trainer.model)["up_proj"][0]
    assert isinstance(layer, Int4Linear)
    stored = sum(t.nbytes() for t in (layer.packed, layer.scales, layer.minima))
    assert stored == 512 * 256 // 32 * 20  # the blocks of Q4_1, byte for byte
