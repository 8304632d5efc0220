"""Adapters of a QLoRA run belong to the base in 4 bits: loading and merging use that form."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lora_helpers import BASE, load_packed, run_config, write_base, write_text
from model_helpers import difference, random_batch
from test_merge import weights_of, write_adapter
from tinygrad import Tensor

from tinyllama.config import ALL_LINEAR
from tinyllama.convert.merge import merge, total_lost
from tinyllama.errors import ConfigError, WeightsError
from tinyllama.formats.huggingface import EMBEDDING
from tinyllama.formats.peft import AdapterFolder
from tinyllama.model.build import load_model
from tinyllama.model.int4 import Int4Linear
from tinyllama.model.layers import block_linears
from tinyllama.model.llama import Llama
from tinyllama.runtime.storage import read
from tinyllama.train.prepare import with_base
from tinyllama.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 8


def logits_of(model):
    return model(Tensor(random_batch(BASE).tokens).realize()).numpy()


def qlora_config(folder, *overrides):
    packed = (f"qlora.block_size={BLOCK}", "lora.dropout=0.0")
    return with_base(run_config(folder, folder / "base", *packed, *overrides))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished QLoRA run: its folder, its last checkpoint, and the logits of its model."""
    folder = tmp_path_factory.mktemp("qlora")
    write_base(folder / "base")
    write_text(folder)
    trainer = Trainer(qlora_config(folder), show=False)
    final = trainer.run().checkpoint
    return folder, final, logits_of(trainer.model)


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


def test_merged_logits_are_those_of_the_run_and_not_of_the_original_base(run, tmp_path):
    folder, final, on = run
    done = merge(folder / "base", [(final, 1.0)], tmp_path / "out")
    assert done.block_size == BLOCK
    assert difference(logits_of(Llama.from_pretrained(tmp_path / "out")), on) < 1e-5
    merge(folder / "base", [(final, 1.0)], tmp_path / "full", packing=None)
    assert difference(logits_of(Llama.from_pretrained(tmp_path / "full")), on) > 1e-3


def test_an_adapters_folder_is_loaded_on_the_base_that_it_was_trained_on(run):
    _, final, on = run
    assert AdapterFolder(final).block_size() == BLOCK
    model = load_model(final)
    bases = [getattr(owner, name) for _, owner, name in block_linears(model.model.layers)]
    assert all(isinstance(getattr(layer, "base", layer), Int4Linear) for layer in bases)
    assert difference(logits_of(model), on) < 1e-6


def test_resuming_on_another_form_of_the_base_is_refused(run, tmp_path):
    folder, final, _ = run
    where = f"checkpointing.checkpoint_dir={tmp_path}/run"
    for override, asked in (
        ("qlora.block_size=16", "a base in 4 bits with block_size 16"),
        ("qlora.quantize_base=false", "a base that is not packed"),
    ):
        with pytest.raises(ConfigError) as error:
            Trainer(qlora_config(folder, where, override), resume=final, show=False)
        assert str(error.value) == (
            f"[qlora] differs from {final}: it was trained on a base in 4 bits with block_size "
            f"{BLOCK}, and this configuration has {asked}"
        )


def test_what_is_lost_is_the_distance_from_the_packed_layers(base, tmp_path):
    adapter, *_ = write_adapter(tmp_path / "a", base, block_size=BLOCK)
    done = merge(base, [(adapter, 0.0)], tmp_path / "out")
    packed, own = load_packed(base, BLOCK), weights_of(base)
    held = {
        f"{path}.weight": getattr(owner, name).dense_weight().numpy()
        for path, owner, name in block_linears(packed.model.layers)
    }
    tables = {name for name in own if own[name].ndim == 2} - held.keys()
    for name in tables:
        bits = read(packed.state_dict()[name]).astype(np.uint32) << 16
        held[name] = bits.view(np.float32)
    assert EMBEDDING in tables and {part.name for part in done.lost} == held.keys()
    merged = weights_of(tmp_path / "out")
    for part in done.lost:
        assert (merged[part.name] == held[part.name]).all(), part.name
        away = own[part.name].astype(np.float64) - held[part.name]
        assert part.largest == np.abs(away).max() > 0
        assert part.rms == pytest.approx(np.sqrt((away**2).mean()))
        wide = own[part.name].astype(np.float64)
        assert part.relative == pytest.approx(np.sqrt((away**2).sum() / (wide**2).sum()))
    total = total_lost(done.lost)
    every = np.concatenate([(own[n] - held[n].astype(np.float64)).ravel() for n in held])
    assert total.count == every.size and total.largest == np.abs(every).max()
    assert total.rms == pytest.approx(np.sqrt((every**2).mean()))


def test_layers_without_an_adapter_are_dequantized_and_norms_kept(base, tmp_path):
    adapter, *_ = write_adapter(tmp_path / "a", base, names=("q_proj",), block_size=BLOCK)
    merge(base, [(adapter, 1.0)], tmp_path / "out")
    own, merged = weights_of(base), weights_of(tmp_path / "out")
    for name, values in own.items():
        same = (values == merged[name]).all()
        assert same == (values.ndim == 1), name


def test_the_form_of_the_base_can_be_chosen(base, tmp_path):
    plain, *_ = write_adapter(tmp_path / "plain", base, names=ALL_LINEAR)
    packed, *_ = write_adapter(tmp_path / "packed", base, names=ALL_LINEAR, block_size=BLOCK)
    merge(base, [(plain, 1.0)], tmp_path / "a", packing=BLOCK)
    merge(base, [(packed, 1.0)], tmp_path / "b")
    merge(base, [(plain, 1.0)], tmp_path / "c")
    merge(base, [(packed, 1.0)], tmp_path / "d", packing=None)
    a, b, c, d = (weights_of(tmp_path / name) for name in "abcd")
    assert all((a[name] == b[name]).all() and (c[name] == d[name]).all() for name in a)
    assert any((a[name] != c[name]).any() for name in a)


def test_adapters_of_different_forms_of_the_base_are_refused(base, tmp_path):
    plain, *_ = write_adapter(tmp_path / "plain", base)
    packed, *_ = write_adapter(tmp_path / "packed", base, block_size=BLOCK)
    both = [(plain, 0.5), (packed, 0.5)]
    with pytest.raises(WeightsError) as error:
        merge(base, both, tmp_path / "out")
    assert str(error.value) == (
        f"the adapters were trained on different forms of the base ({plain} on the base, {packed} "
        "on 4 bits in groups of 8): choose one with --quantized-base and --block-size, or with "
        "--full-base"
    )
    assert merge(base, both, tmp_path / "out", packing=None).block_size is None


def test_a_block_size_that_does_not_divide_is_refused(base, tmp_path):
    adapter, *_ = write_adapter(tmp_path / "a", base, block_size=64)
    with pytest.raises(ConfigError, match=r"block_size: got 64.*the largest that does is 32"):
        merge(base, [(adapter, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unmerge_gives_the_base_in_4_bits(base, tmp_path):
    adapter, *_ = write_adapter(tmp_path / "a", base, block_size=BLOCK)
    merge(base, [(adapter, 1.0)], tmp_path / "merged")
    done = merge(tmp_path / "merged", [(adapter, 1.0)], tmp_path / "again", unmerge=True)
    merge(base, [(adapter, 0.0)], tmp_path / "packed")
    before = weights_of(tmp_path / "packed")
    assert done.block_size is None
    for name, values in weights_of(tmp_path / "again").items():
        assert np.abs(values - before[name]).max() < 1e-6, name


def test_a_recorded_block_size_that_is_no_number_is_refused(base, tmp_path):
    adapter, *_ = write_adapter(tmp_path / "a", base, block_size=BLOCK)
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'block_size":"8"', b'block_size":"x"'))
    with pytest.raises(WeightsError, match=r"base_int4_block_size: got 'x', must be 1 or more"):
        AdapterFolder(adapter).block_size()


def test_the_script_says_what_precision_was_lost(base, tmp_path):
    adapter, *_ = write_adapter(tmp_path / "a", base, block_size=BLOCK)

    def run_script(*words):
        command = [sys.executable, ROOT / "tools" / "merge.py", "--base", base]
        command += ["--adapter", adapter, "--out", tmp_path / "out", *words]
        return subprocess.run(command, capture_output=True, text=True)

    refused = run_script("--quantized-base", "--block-size", "3")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == ("merge: --block-size: got 3, must be 2 or more and a multiple of 2\n")
    done = run_script("--quantized-base", "--block-size", "16")
    lines = done.stdout.splitlines()
    assert lines[0] == "the base in 4 bits, groups of 16 (embedding and head in bfloat16):"
    matrices = [name for name, values in weights_of(base).items() if values.ndim == 2]
    assert [line.split()[0] for line in lines[2:-1]] == [*matrices, "total"]
    assert 0.05 < float(lines[-2].split()[-1].rstrip("%")) / 100 < 0.2  # 4 bits, groups of 16
    assert lines[-1].startswith(f"{tmp_path / 'out'}: 4 of {len(weights_of(base))} tensors changed")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
