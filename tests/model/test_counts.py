"""Parameters, bytes and FLOPs: counted by walking the model, and by formula."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from lora_helpers import BASE, placed_on, with_adapters, write_base
from model_helpers import GROUPED, TIED, build
from runs_helpers import tool

from tinyllama.config import (
    ALL_LINEAR,
    Config,
    LlamaConfig,
    LoraConfig,
    load_config,
)
from tinyllama.formats.huggingface import linear_shapes
from tinyllama.model.counts import (
    Parameters,
    adapter_parameters,
    aligned,
    attention_flops,
    bytes_of,
    folder_parameters,
    gigabytes,
    layer_parameters,
    megabytes,
    model_flops,
    packed_bytes,
    packed_linear_bytes,
    parameters,
    parameters_of,
    part_of,
    product_parameters,
    published_claims,
    training_bytes,
)
from tinyllama.model.llama import Llama
from tinyllama.model.lora import write_adapter
from tinyllama.train.memory_estimate import model_parameters

ROOT = Path(__file__).resolve().parents[2]
TOY, BIG = LlamaConfig.toy_124m(), LlamaConfig.llama2_7b()


@pytest.mark.parametrize("config", [GROUPED, TIED, BASE, TOY, BIG])
def test_walking_the_model_counts_what_the_formula_says(config):
    assert model_parameters(Config(model=config)) == parameters(config)


def test_a_blank_model_of_seven_billion_parameters_holds_no_memory():
    from tinygrad.helpers import GlobalCounters

    before = GlobalCounters.mem_used
    assert Llama(BIG, seed=None).count_parameters() == 6_738_415_616
    assert GlobalCounters.mem_used == before


def test_the_parts_of_a_grouped_model():
    config = LlamaConfig(
        vocab_size=1000, hidden_size=64, num_layers=3, num_heads=8, num_kv_heads=2,
        intermediate_size=96,
    )  # fmt: skip
    assert model_parameters(Config(model=config)) == Parameters(
        embedding=64_000,
        attention=3 * (2 * 64 * 64 + 2 * 64 * 16),
        feed_forward=3 * 3 * 64 * 96,
        norms=7 * 64,
        head=64_000,
    )


def test_a_tied_head_counts_once():
    tied = replace(TOY, tie_word_embeddings=True)
    assert parameters(tied).total == 137_841_408
    assert parameters(tied).head == 0
    assert parameters(TOY).total == 162_417_408
    assert parameters(TOY).total - parameters(TOY).norms == 162_398_208


@pytest.mark.parametrize(
    ("lora", "count"),
    [
        (LoraConfig(rank=16), 1_179_648),
        (LoraConfig(rank=1, target_modules=("down_proj",)), 12 * (3072 + 768)),
        (LoraConfig(rank=2, target_modules="all-linear"), 12 * 2 * (4 * 1536 + 3 * 3840)),
    ],
)
def test_adapters_are_trained_and_the_base_is_the_rest(lora, count):
    found = model_parameters(Config(model=TOY, lora=lora))
    assert found == parameters(TOY, lora)
    assert found.adapters == found.trainable == adapter_parameters(TOY, lora) == count
    assert found.base == 162_417_408
    assert found.total == 162_417_408 + count


def test_a_packed_base_counts_as_the_numbers_it_stands_for():
    config = load_config(ROOT / "configs" / "7b.toml")
    assert model_parameters(config).table() == parameters(BIG, config.lora).table()


def test_dropout_keys_are_no_parameters():
    lora = LoraConfig(rank=2, dropout=0.5)
    assert model_parameters(Config(model=BASE, lora=lora)) == parameters(BASE, lora)


def test_linear_shapes_are_those_of_the_model():
    layer = Llama(GROUPED, seed=None).model.layers[0]
    owners = {name: layer.self_attn if name[0] in "qkvo" else layer.mlp for name in ALL_LINEAR}
    owners["up_proj"] = layer.mlp
    owners["down_proj"] = layer.mlp
    shapes = {name: getattr(owners[name], name).weight.shape for name in ALL_LINEAR}
    assert linear_shapes(GROUPED) == shapes
    inside = sum(rows * columns for rows, columns in shapes.values())
    assert layer_parameters(GROUPED) == inside + 2 * GROUPED.hidden_size
    assert product_parameters(GROUPED) == 2 * inside + 131 * 48


def test_a_name_that_is_no_part_is_refused():
    with pytest.raises(ValueError, match=r"vision_tower\.weight: belongs to no part of a LLaMA"):
        part_of("vision_tower.weight")


def test_names_decide_the_part():
    counts = [("model.layers.0.self_attn.q_proj.lora_A.weight", 1)]
    counts += [("model.layers.0.self_attn.q_proj.weight", 10), ("model.norm.weight", 100)]
    counts += [("model.layers.0.post_attention_layernorm.weight", 1000), ("lm_head.weight", 5)]
    assert parameters_of(counts) == Parameters(attention=10, norms=1100, head=5, adapters=1)


def test_a_folder_is_counted_by_its_files(tmp_path):
    write_base(tmp_path / "base")
    assert folder_parameters(tmp_path / "base") == parameters(BASE)


def test_an_adapter_folder_is_counted_with_its_base(tmp_path):
    write_base(tmp_path / "base")
    model = build(BASE)
    placed = placed_on(model, ("q_proj", "down_proj"))
    config = with_adapters(model, placed, base=str(tmp_path / "base"))
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", model, config)
    lora = LoraConfig(rank=3, target_modules=("q_proj", "down_proj"))
    assert folder_parameters(tmp_path / "adapter") == parameters(BASE, lora)


def test_bytes_fill_up_the_last_byte():
    assert [bytes_of(3, bits) for bits in (32, 16, 8, 4, 2)] == [12, 6, 3, 2, 1]
    assert bytes_of(2**70 + 1, 4) == 2**69 + 1


def test_bytes_of_the_models():
    assert bytes_of(parameters(TOY).total, 32) == 649_669_632
    assert bytes_of(parameters(BIG).total, 32) == 26_953_662_464
    assert training_bytes(parameters(BIG).total) == 107_814_649_856
    assert training_bytes(parameters(BIG).total, 16) == 12 * 107_814_649_856 // 16
    assert packed_bytes(4, 128, 4, 64) == (256, 16)
    assert packed_linear_bytes(BIG, 4, 64) == (3_238_002_688, 202_375_168)
    rows = 2**60 + 1  # past what a float can count
    assert packed_bytes(rows, 64, 4, 64) == (32 * rows, 2 * rows)


def test_units_are_powers_of_ten():
    assert megabytes(10**13) == "10,000,000.0 MB"
    assert gigabytes(10**19) == "10,000,000,000.00 GB"


def test_flops_of_a_step():
    config = LlamaConfig(
        vocab_size=100, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=12,
        max_seq_len=16,
    )  # fmt: skip
    products = 2 * (4 * 64 + 3 * 96) + 800
    attention = 6 * 2 * 8 * 16 * 32
    assert attention_flops(config, 32, 16) == attention
    assert model_flops(config, 32, 16) == 6 * products * 32 + attention
    lora = LoraConfig(rank=3, target_modules=("up_proj",))
    adapters = 2 * 3 * (8 + 12)
    frozen = (4 * products + 6 * adapters) * 32
    assert model_flops(config, 32, 16, lora) == frozen + attention


def test_published_figures_stand_beside_the_true_ones():
    claims = {claim.what: (claim.published, claim.true) for claim in published_claims()}
    assert list(claims.values()) == [
        ("162,398,208", "162,417,408"),
        ("8,388,608", "67,108,864"),
        ("500 MB", "649.7 MB"),
        ("28 GB", "26.95 GB"),
        ("28 GB", "107.81 GB"),
        ("7.5 GB", "3.97 GB"),
        ("32 MB", "268.4 MB"),
    ]
    assert published_claims()[0].why == "the 25 RMSNorm weights were left out"


def test_a_table_stands_in_columns():
    rows = [{"part": "a", "count": "1", "why": "x"}, {"part": "bcdef", "count": "1,000", "why": ""}]
    assert aligned(rows, left=["why"]) == "part   count  why\na          1  x\nbcdef  1,000"
    assert aligned(rows[:1]) == "part  count  why\na         1    x"


def test_params_prints_one_object(capsys):
    source = str(ROOT / "configs" / "7b.toml")
    code, out, _ = tool("params", source, "--json", "--set", "lora.rank=8", capsys=capsys)
    found = json.loads(out)
    assert code == 0
    assert (found["total"], found["base"]) == (6_746_804_224, 6_738_415_616)
    assert found["trainable"] == found["parts"]["adapters"] == 8_388_608
    assert sum(found["parts"].values()) == found["total"]
    assert found["bytes"]["4"] == 3_373_402_112


def test_params_prints_a_table(capsys):
    _, out, _ = tool("params", str(ROOT / "configs" / "124m.toml"), capsys=capsys)
    lines = [line.split() for line in out.splitlines()]
    assert ["norms", "19,200", "0.1", "0.0", "0.0", "0.0", "0.0"] in lines
    assert ["total", "162,417,408", "649.7", "324.8", "162.4", "81.2", "40.6"] in lines
    assert out.endswith("base 162,417,408, trainable 162,417,408\n")


def test_params_of_a_folder_refuses_overrides(tmp_path, capsys):
    code, out, err = tool("params", str(tmp_path), "--set", "model.hidden_size=9", capsys=capsys)
    assert (code, out) == (2, "")
    assert err == (
        f"params: --set model.hidden_size=9: {tmp_path} is a folder, whose files are counted as"
        " they are: leave --set out\n"
    )


def test_params_counts_a_folder(tmp_path, capsys):
    write_base(tmp_path / "base")
    _, out, _ = tool("params", str(tmp_path / "base"), "--json", capsys=capsys)
    assert json.loads(out)["total"] == parameters(BASE).total


def test_params_prints_published_and_true(capsys):
    code, out, _ = tool("params", "--published", capsys=capsys)
    assert code == 0
    assert "162,398,208  162,417,408  the 25 RMSNorm weights were left out" in out
    _, out, _ = tool("params", "--published", "--json", capsys=capsys)
    assert [claim["true"] for claim in json.loads(out)][1] == "67,108,864"


def test_params_says_what_is_wrong(tmp_path, capsys):
    code, _, err = tool("params", str(tmp_path / "no.toml"), capsys=capsys)
    assert code == 2
    message = "no such file; configurations by name: 124m, 7b, demo or lora"
    assert err == f"params: {tmp_path / 'no.toml'}: {message}\n"
    code, _, err = tool("params", capsys=capsys)
    message = "name a configuration or a folder, or type --published instead"
    assert (code, err) == (2, f"params: {message}\n")


def test_accounting_does_not_need_tinygrad():
    import subprocess

    code = "import sys, tinyllama.model.counts; sys.exit('tinygrad' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_little_less_than_nothing_is_written_without_a_sign():
    assert gigabytes(-3_000_000) == "0.00 GB"
    assert gigabytes(-30_000_000) == "-0.03 GB"
    assert gigabytes(1_234_567_890_123) == "1,234.57 GB"
