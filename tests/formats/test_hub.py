"""Models by their name on a hub, against a server of our own; huggingface_hub does the rest."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import Repository, files_of, serve
from lora_helpers import BASE, write_base, write_text

from tinyllama.config import config_from_toml
from tinyllama.errors import WeightsError
from tinyllama.formats import hub
from tinyllama.formats.huggingface import INDEX, HfFolder
from tinyllama.formats.models import local_path, open_model
from tinyllama.model.build import build
from tinyllama.model.counts import folder_parameters
from tinyllama.model.lora import write_adapter
from tinyllama.train.prepare import with_base

RUN = """
[model]
base = "some/model"
[training]
batch_size = 2
max_steps = 2
[data]
train_path = "train.txt"
context_length = 32
[checkpointing]
checkpoint_dir = "run"
[lora]
rank = 2
"""
ROOT = Path(__file__).resolve().parents[2]
CODE = """
import json, sys
from tinyllama.errors import TinyllamaError
from tinyllama.formats.models import local_path, open_model
try:
    path = local_path(sys.argv[1])
    tensors = 0
    if path.is_dir() and (path / "config.json").exists():
        tensors = len(open_model(sys.argv[1]).names)
    print(json.dumps({"path": str(path), "tensors": tensors}))
except TinyllamaError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with shards, a pickle, weights in another format and a file in a folder."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    write_base(folder, max_shard_bytes=30_000)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (folder / "consolidated.safetensors").write_bytes(b"")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"")
    return folder


def ask(name, address, cache, **environment):
    """What opening a name gives, in a process of its own: {"path", "tensors"} or {"error"}."""
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", CODE, name],
        env={**os.environ, **settings},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def fetched(repository):
    return {file for method, file, _ in repository.requests if method == "GET"}


def test_a_name_is_fetched_once_and_only_what_is_needed(model, tmp_path):
    repository = Repository({"main": files_of(model)})
    with serve({"some/model": repository}) as address:
        found = ask("some/model", address, tmp_path)
        assert found["tensors"] == len(HfFolder(model).names)
        shards = {path.name for path in model.glob("model-*.safetensors")}
        assert len(shards) > 2
        small = {"config.json", "generation_config.json", "model.safetensors.index.json"}
        small |= {"tokenizer.model", "tokenizer_config.json"}
        assert fetched(repository) == shards | small
        repository.requests.clear()
        assert ask("some/model", address, tmp_path) == found
        assert fetched(repository) == set()
        # That it is still the newest state of the repository is asked once.
        assert {part[:2] for part in repository.requests} == {("HEAD", "config.json")}
    assert ask("some/model", address, tmp_path) == found  # the server has gone
    assert ask("some/model", address, tmp_path, HF_HUB_OFFLINE="1") == found


def test_a_revision_is_another_state_of_the_repository(model, tmp_path):
    files = files_of(model)
    old = {name: data for name, data in files.items() if name != "tokenizer_config.json"}
    repository = Repository({"main": files, "v1": old})
    with serve({"some/model": repository}) as address:
        for revision, commit in (
            ("@v1", "v1"),
            (f"@{repository.commit('v1')}", "v1"),
            ("", "main"),
        ):
            found = ask(f"some/model{revision}", address, tmp_path)
            assert Path(found["path"]).name == repository.commit(commit)
        message = ask("some/model@v2", address, tmp_path)["error"]
    assert message == f"some/model@v2: no such revision on {address}"


def test_a_download_that_was_cut_goes_on_where_it_ended(tmp_path):
    """The library writes what has come in pieces of 10 MB."""
    data = bytes(25_000_000)
    repository = Repository({"main": {"a.gguf": data}}, cut_after=24_000_000)
    with serve({"some/model": repository}) as address:
        found = ask("some/model:a.gguf", address, tmp_path)
        assert Path(found["path"]).read_bytes() == data
    ranges = [asked for method, _, asked in repository.requests if method == "GET"]
    assert ranges == [None, "bytes=20971520-"]


def test_one_gguf_file_of_a_repository(tmp_path):
    repository = Repository(
        {"main": {"a.Q4_0.gguf": b"GGUF....", "b.gguf": b"", "config.json": b"{}"}}
    )
    with serve({"some/model": repository}) as address:
        found = ask("some/model:a.Q4_0.gguf", address, tmp_path)
        assert Path(found["path"]).read_bytes() == b"GGUF...."
        assert fetched(repository) == {"a.Q4_0.gguf"}
        message = ask("some/model:c.gguf", address, tmp_path)["error"]
    assert message == f"some/model:c.gguf: no such file on {address}"


def test_an_adapter_of_the_hub_has_its_two_files(tmp_path):
    needed = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}
    repository = Repository({"main": needed | {"adapter_model.bin": b""}})
    with serve({"some/adapter": repository}) as address:
        folder = Path(ask("some/adapter", address, tmp_path)["path"])
    assert files_of(folder) == needed


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        (
            None,
            "NAME: no such file or folder here, and no model of that name on ADDRESS (if it ",
        ),
        (Repository({}, "GatedRepo"), "NAME: access is granted on its page, ADDRESS/NAME; then ty"),
        (
            Repository({}, "RepoNotFound"),
            "NAME: no such file or folder here, and no model of that",
        ),
        (
            Repository({"main": {"config.json": b"{}", "pytorch_model.bin": b""}}),
            "NAME on ADDRESS: holds no model.safetensors: only weights in safetensors are read; a",
        ),
        (
            Repository({"main": {"README.md": b""}}),
            "NAME on ADDRESS: holds none of config.json, adapter_config.json, params.json",
        ),
    ],
)
def test_what_cannot_be_fetched_is_said_in_one_line(repository, message, tmp_path):
    with serve({"some/model": repository} if repository else {}) as address:
        found = ask("some/model", address, tmp_path)["error"]
    assert found.startswith(message.replace("ADDRESS", address).replace("NAME", "some/model"))
    assert "\n" not in found


def test_without_a_network_or_a_cache_that_is_said(tmp_path):
    found = ask("some/model", "http://127.0.0.1:9", tmp_path)["error"]
    assert found == (
        "some/model: no such file or folder here, and not in the cache of the hub either (no "
        "connection to http://127.0.0.1:9)"
    )
    found = ask("some/model", "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")["error"]
    assert found.endswith("(HF_HUB_OFFLINE is set)")


def test_a_path_that_exists_wins_over_a_name(tmp_path, monkeypatch):
    write_base(tmp_path / "some" / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "fetch", lambda text: pytest.fail("fetched"))
    assert local_path("some/model") == Path("some/model")
    assert open_model("some/model").config.vocab_size == BASE.vocab_size


def test_without_the_library_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match=r"^some/model: no such .*'tinyllama-trainer\[hub\]'$"):
        local_path("some/model")


def test_a_name_below_a_folder_that_is_here_is_a_path(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "fetch", lambda text: pytest.fail("fetched"))
    with pytest.raises(WeightsError, match=r"^runs/final: not a folder$"):
        open_model("runs/final")


def test_an_adapter_trained_on_a_base_of_the_hub_names_it_and_its_commit(tmp_path):
    """So that others can load it, and that it is the same base which they get."""
    base = write_base(tmp_path / "hub" / "models--some--model" / "snapshots" / "abc")
    assert hub.name_of(base) == "some/model@abc"
    assert hub.name_of(base / "x" / "a.gguf") == "some/model@abc:x/a.gguf"
    assert hub.name_of(tmp_path / "hub") is None
    config = config_from_toml("", "t", ["model.base=some/model", "lora.rank=2"])
    config = replace(config, model=replace(config.model, base=str(base)))
    config = config.with_base(open_model(base).config, "base")
    built = build(config)
    write_adapter(tmp_path, built.model, built.adapter)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("some/model", "abc")


def test_a_run_on_a_name_uses_what_it_stands_for(tmp_path, monkeypatch):
    base = write_base(tmp_path / "base")
    monkeypatch.setattr(hub, "fetch", lambda text: base)
    config = with_base(config_from_toml("", "t", ["model.base=some/model"]))
    assert config.model.base == config.tokenizer_source == str(base)
    assert config.model.vocab_size == BASE.vocab_size


def test_training_generating_counting_and_merging_take_names(model, tmp_path):
    write_text(tmp_path)
    repository = Repository({"main": files_of(model)})
    with serve({"some/model": repository}) as address:

        def run(*words):
            settings = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache")}
            done = subprocess.run(
                [sys.executable, "-m", "tinyllama", *words],
                env={**os.environ, **settings, "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)},
                cwd=tmp_path,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        total = json.loads(run("params", "some/model", "--json"))["total"]
        (tmp_path / "run.toml").write_text(RUN)
        run("train", "run.toml", "--quiet")
        run("generate", "--model", "run/final", "--prompt", "a", "--max-new-tokens", "3")
        run("generate", "--model", "some/model@main", "--prompt", "a", "--max-new-tokens", "3")
        run("merge", "--base", "some/model", "--adapter", "run/final", "--out", "merged")
    assert folder_parameters(tmp_path / "merged").total == total
    assert {path.name for path in (tmp_path / "merged").iterdir()} >= {"config.json", INDEX}
    written = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "some/model"
    assert written["revision"] == repository.commit("main")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HuggingFaceTB/SmolLM2-135M", ("HuggingFaceTB/SmolLM2-135M", None, None)),
        ("a/b@v1.0", ("a/b", "v1.0", None)),
        ("a/b@refs/pr/1:x/y.Q8_0.gguf", ("a/b", "refs/pr/1", "x/y.Q8_0.gguf")),
        ("a/b:file.bin", None),
        ("model", None),
        ("runs/a/final", None),
        ("/runs/final", None),
        ("../runs", None),
        ("./runs", None),
        ("a/..", None),
        ("a/b@", None),
        ("a/b\n", None),
        ("a b/c", None),
    ],
)
def test_names_of_the_hub(text, expected):
    assert hub.parse(text) == expected
