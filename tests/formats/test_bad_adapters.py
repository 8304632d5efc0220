"""Adapters that are wrong on purpose: short lines, under a second, and never loaded in silence."""

import json
import os
import time

import numpy as np
import pytest
from lora_helpers import BASE, write_base
from model_helpers import random_batch
from tinygrad import Tensor

from tinyllama import Llama
from tinyllama.convert.merge import merge
from tinyllama.errors import TinyllamaError, WeightsError
from tinyllama.formats.huggingface import EMBEDDING, HEAD, linear_shapes_by_path
from tinyllama.formats.models import open_model
from tinyllama.formats.peft import AdapterConfig, Placement, open_adapter, save_adapter
from tinyllama.formats.safetensors import SafetensorsFile, write_safetensors
from tinyllama.model.build import load_model
from tinyllama.model.counts import folder_parameters

ESCAPE = "\x1b[2J\x9b31m\u202e"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("adapters") / "base")


def write_adapter(folder, base, names=("q_proj", "v_proj"), extra=None, **entries):
    """An adapter of rank 2 on layers of the base, with other tensors and entries besides."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    shapes = linear_shapes_by_path(BASE)
    shapes = {path: shape for path, shape in shapes.items() if path.endswith(names)}
    placed = dict.fromkeys(shapes, Placement(2, 4.0))
    tensors = {}
    for path, (out, into) in shapes.items():
        for part, shape in (("lora_A", (2, into)), ("lora_B", (out, 2))):
            tensors[f"{path}.{part}.weight"] = rng.standard_normal(shape).astype(np.float32)
    config = AdapterConfig(placed, base=str(base))
    save_adapter(folder, config, tensors, layers=linear_shapes_by_path(BASE))
    edit(folder, **entries)
    if extra:
        file = SafetensorsFile(folder / WEIGHTS)
        held = {name: np.array(file.array(name)) for name in file.names}
        (folder / WEIGHTS).unlink()
        write_safetensors(folder / WEIGHTS, held | extra)
    return folder


def edit(folder, **entries):
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | entries))


def fifo(name):
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


BAD = {
    "dropout 2": ({"lora_dropout": 2.0}, "lora_dropout: expected float < 1"),
    "dropout NaN": ({"lora_dropout": float("nan")}, "lora_dropout: expected float >= 0.0"),
    "dropout of text": ({"lora_dropout": "0.1"}, "lora_dropout: expected float | null, got str"),
    "rslora of text": ({"use_rslora": "false"}, "use_rslora: expected bool | null, got str"),
    "an object of targets": ({"target_modules": {"q_proj": 1}}, "target_modules: expected str |"),
    "a number of targets": ({"target_modules": 3}, "target_modules: expected str | array | null"),
    "targets of numbers": ({"target_modules": [3]}, "target_modules[0]: expected str, got int"),
    "exponential": ({"target_modules": "([a-z_.0-9]+)+!"}, "must name linear layers of the model"),
    "a look ahead": ({"target_modules": "(?=q)q_proj"}, "assert is not supported in a regular"),
    "too many states": ({"target_modules": "((a{99}){99}){99}"}, "repeats too much"),
    "an exponential pattern": (
        {"rank_pattern": {"([a-z_.0-9]+)+!": 3}, "target_modules": ["k_proj"]},
        "k_proj.lora_A.weight: missing",
    ),
    "100,000 patterns": (
        {"rank_pattern": {f"x{i}": 1 for i in range(50_000)}},
        "rank_pattern: 50000 patterns, at most 2000 are allowed",
    ),
    "patterns in a list": ({"alpha_pattern": [1]}, "alpha_pattern: expected object | null"),
    "rank 2^60": ({"r": 1 << 60}, "r: got 1152921504606846976, must be an integer above 0"),
    "rank -1": ({"r": -1}, "r: got -1, must be an integer above 0"),
    "alpha inf": ({"lora_alpha": float("inf")}, "lora_alpha: got inf, must be a finite number"),
    "alpha of text": ({"lora_alpha": ESCAPE}, "lora_alpha: got "),
    "layers of text": ({"layers_to_transform": "1"}, "layers_to_transform: expected int | array"),
    "modules of numbers": ({"modules_to_save": [1]}, "modules_to_save[0]: expected str, got int"),
    "a module that is missing": (
        {"modules_to_save": ["lm_head"]},
        "base_model.model.lm_head.weight: missing",
    ),
    "dora": ({"use_dora": True}, "use_dora: got True, must be absent or empty: it is not suppor"),
    "a base with a zero": ({"base_model_name_or_path": "a\0b"}, "base_model_name_or_path: got"),
    "a base with escapes": ({"base_model_name_or_path": ESCAPE}, "base_model_name_or_path: got"),
    "a base of a megabyte": ({"base_model_name_or_path": "x" * 999_000}, "base_model_name_or_path"),
    "a list for a base": ({"base_model_name_or_path": [1]}, "base_model_name_or_path: expected"),
    "git lfs": (
        lambda f: (f / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        f"{WEIGHTS}: is a Git LFS pointer",
    ),
    "a FIFO": (fifo(WEIGHTS), f"{WEIGHTS}: is no regular file"),
    "a FIFO for a configuration": (fifo(CONFIG), f"{CONFIG}: is no regular file"),
    "deep": (lambda f: (f / CONFIG).write_text("[" * 100_000), f"{CONFIG}: not JSON"),
    "huge": (lambda f: (f / CONFIG).write_text(" " * 2_000_000), f"{CONFIG}: 2000000 bytes, at mo"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_is_refused_in_short_lines_in_under_a_second(case, base, tmp_path):
    change, message = BAD[case]
    entries = change if isinstance(change, dict) else {}
    folder = write_adapter(tmp_path / "a", base, **entries)
    if callable(change):
        change(folder)
    start = time.perf_counter()
    with pytest.raises(TinyllamaError) as caught:
        adapter, opened = open_adapter(folder)
        adapter.config(opened.config)
    seconds = time.perf_counter() - start
    lines = str(caught.value).split("\n")
    assert any(message in line for line in lines), str(caught.value)
    assert len(lines) <= 21
    assert all(len(line) < 1000 + 2 * len(str(folder)) and line.isprintable() for line in lines)
    assert seconds < 1, f"{seconds:.2f} s"


def outside(seed=2):
    """LoRA of the head and the embedding, in PEFT's spelling, and the head as a whole."""
    rng = np.random.default_rng(seed)
    V, h = BASE.vocab_size, BASE.hidden_size
    shapes = {
        "lm_head.lora_A.weight": (2, h),
        "lm_head.lora_B.weight": (V, 2),
        "model.embed_tokens.lora_embedding_A": (2, V),
        "model.embed_tokens.lora_embedding_B": (h, 2),
    }
    return {
        f"{PREFIX}{name}": (0.1 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


NAMES = ["q_proj", "v_proj", "lm_head", "embed_tokens"]


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_adapted_and_merged_by_the_formula(tied, tmp_path):
    config = type(BASE)(**{**BASE.__dict__, "tie_word_embeddings": tied})
    base = write_base(tmp_path / "base", config)
    extra = outside()
    adapter = write_adapter(tmp_path / "a", base, extra=extra, target_modules=NAMES)
    merge(base, [(adapter, 0.5)], tmp_path / "half")
    merge(base, [(adapter, 1.0)], tmp_path / "out")
    a, b, ea, eb = (values.astype(np.float64) for values in extra.values())
    old, out, half = (open_model(tmp_path / name) for name in ("base", "out", "half"))
    assert out.config.tie_word_embeddings is False
    before = old.float32(EMBEDDING if tied else HEAD)
    for opened, weight in ((out, 2.0), (half, 1.0)):  # alpha / r is 2
        np.testing.assert_allclose(
            opened.float32(EMBEDDING), old.float32(EMBEDDING) + weight * (eb @ ea).T, atol=1e-6
        )
        np.testing.assert_allclose(opened.float32(HEAD), before + weight * b @ a, atol=1e-6)
    tokens = Tensor(random_batch(BASE).tokens).realize()
    adapted, merged = load_model(adapter)(tokens), Llama.from_pretrained(tmp_path / "out")(tokens)
    np.testing.assert_allclose(adapted.numpy(), merged.numpy(), rtol=1e-4, atol=1e-4)
    assert folder_parameters(adapter).adapters == sum(v.size for v in extra.values()) + 4 * 128


def test_a_module_trained_as_a_whole_stands_in_place_of_the_bases(base, tmp_path):
    head = np.random.default_rng(3).standard_normal((300, 32)).astype(np.float32)
    extra = {f"{PREFIX}lm_head.weight": head}
    adapter = write_adapter(tmp_path / "a", base, extra=extra, modules_to_save=["lm_head"])
    done = merge(base, [(adapter, 1.0)], tmp_path / "out")
    assert (open_model(tmp_path / "out").float32(HEAD) == head).all()
    assert done.changed == 5
    assert (load_model(adapter).head_weight().numpy() == head).all()
    other = write_adapter(tmp_path / "b", base, extra=extra, modules_to_save=["lm_head"])
    for adapters, message in (
        ([(adapter, 0.5)], "which a weight of 0.5 cannot be applied to: merge it with 1"),
        ([(adapter, 1.0), (other, 1.0)], f"and {adapter} holds another one: merge one of them"),
    ):
        with pytest.raises(WeightsError, match=message):
            merge(base, adapters, tmp_path / "no")
    with pytest.raises(WeightsError, match="which a weight of -1 cannot be applied to"):
        merge(base, [(adapter, 1.0)], tmp_path / "no", unmerge=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_that_is_not_finite_is_not_merged_in_silence(dtype, tmp_path):
    base = write_base(tmp_path / "base", dtype=dtype)
    opened = open_model(base)
    tensors = {name: opened.source(name).load() for name in opened.names}
    norm = np.array(opened.array("model.norm.weight"))
    norm[3] = np.nan if dtype == "float32" else 0x7F80
    loaded = type(tensors["model.norm.weight"])
    tensors["model.norm.weight"] = loaded(opened.dtype("model.norm.weight"), norm.shape, norm)
    data = {name: loaded(t.dtype, t.shape, np.array(t.data)) for name, t in tensors.items()}
    (base / "model.safetensors").unlink()
    write_safetensors(base / "model.safetensors", data)
    adapter = write_adapter(tmp_path / "a", base)
    with pytest.raises(WeightsError, match=r"base: model.norm.weight: would hold a value that"):
        merge(base, [(adapter, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_finite_adapters_whose_product_overflows_are_refused_by_the_tensors_name(base, tmp_path):
    adapter = write_adapter(tmp_path / "a", base, lora_alpha=1e29)
    file = SafetensorsFile(adapter / WEIGHTS)
    held = {name: np.array(file.array(name)) * np.float32(1e15) for name in file.names}
    (adapter / WEIGHTS).unlink()
    write_safetensors(adapter / WEIGHTS, held)
    with pytest.raises(WeightsError, match=r"q_proj.weight: would hold a value that is not finite"):
        merge(base, [(adapter, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_of_the_hub_is_named_with_its_revision(base, tmp_path, monkeypatch):
    from tinyllama.formats import hub

    asked = []
    monkeypatch.setattr(hub, "fetch", lambda text: asked.append(text) or base)
    entries = {"base_model_name_or_path": "some/model", "revision": "v1"}
    adapter = write_adapter(tmp_path / "a", base, **entries)
    opened = open_adapter(adapter)[1]
    assert (asked, opened.path) == (["some/model@v1"], base)
