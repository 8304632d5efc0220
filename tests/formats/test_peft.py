"""Where an adapter's base is: a path from the adapter's folder, so that both can be moved."""

import json
from pathlib import Path

import pytest

from tinyllama.errors import WeightsError
from tinyllama.formats.peft import AdapterConfig, AdapterFolder, Placement, save_adapter
from tinyllama.formats.safetensors import write_safetensors


def saved(folder, base):
    """The adapter_config.json of an adapter without matrices on a base."""
    folder.mkdir(parents=True)
    config = AdapterConfig({"model.layers.0.self_attn.q_proj": Placement(2, 4.0)}, base=str(base))
    save_adapter(folder, config, {}, layers=list(config.placed))
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


def named(folder, base):
    """An adapter's folder that names a base so."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": base})
    )
    write_safetensors(folder / "adapter_model.safetensors", {}, {"format": "pt"})
    return AdapterFolder(folder)


def test_a_base_below_a_common_parent_is_named_from_the_adapters_folder(tmp_path):
    (tmp_path / "models" / "base").mkdir(parents=True)
    base, folder = tmp_path / "models" / "base", tmp_path / "runs" / "mine" / "final"
    assert saved(folder, base) == "../../../models/base"
    assert AdapterFolder(folder).base_folder() == base.resolve()
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "mine")
    assert AdapterFolder(tmp_path / "link" / "final").base_folder() == base.resolve()


def test_a_base_that_shares_only_the_root_keeps_its_whole_path(tmp_path):
    assert saved(tmp_path / "adapter", "/nowhere/base") == "/nowhere/base"
    assert saved(tmp_path / "hub", "meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"


def test_a_folder_under_a_partial_name_names_what_the_final_one_will(tmp_path):
    assert saved(tmp_path / "run" / ".final.partial-7", tmp_path / "base") == "../../base"


def test_a_relative_base_is_looked_for_from_the_adapter_then_from_here(tmp_path, monkeypatch):
    here, adapter = tmp_path / "here", tmp_path / "there" / "adapter"
    (here / "base").mkdir(parents=True)
    monkeypatch.chdir(here)
    found = named(adapter, "base")
    assert found.base_folder() == Path("base")
    (adapter / "base").mkdir()
    assert found.base_folder() == (adapter / "base").resolve()


@pytest.mark.parametrize("base", [None, "", "nowhere", "/nowhere/base"])
def test_a_base_that_is_not_there_is_named_as_it_stands(tmp_path, base):
    with pytest.raises(WeightsError, match=r"base_model_name_or_path: got .*, must be the folder"):
        named(tmp_path / "adapter", base).base_folder()
