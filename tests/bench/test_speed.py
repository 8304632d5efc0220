"""The script behind the README's table of speed: its commands parse, and one case runs for real."""

import importlib
import json
from pathlib import Path

import pytest

from tinyllama.bench.benchmark import parser, resolve
from tinyllama.system import device

TOOLS = Path(__file__).resolve().parents[2] / "tools"

speed = importlib.import_module("speed")


EVERY = {**speed.cases("AMX"), **speed.cases("AVX2")}


def test_with_amx_torch_compile_and_the_whole_context_are_compared() -> None:
    more = speed.cases("AMX").keys() - speed.cases("AVX-512-BF16").keys()
    peers = {name: parser().parse_args(EVERY[name].split()).peer for name in more}
    assert peers == {
        "124m, 1 x 512, bfloat16 (torch.compile)": "torch-compile",
        "124m, 4 x 256, bfloat16 (torch.compile)": "torch-compile",
        "124m, 1 x 2048, bfloat16": "torch",
        "124m LoRA rank 16, 1 x 512, bfloat16 (peft)": "torch",
    }


@pytest.mark.parametrize("name", EVERY)
def test_a_case_is_what_its_name_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(speed.ROOT)
    options = parser().parse_args(EVERY[name].split())
    config = resolve(options)
    batch, context = config.training.micro_batch, config.context_length
    assert f"{batch} x {context}" in name
    assert f"{config.training.dtype}" in name or config.qlora is not None
    assert config.model.hidden_size == (768 if name.startswith("124m") else 256)
    assert ("LoRA" in name) == (config.lora is not None)
    assert ("QLoRA" in name) == (config.qlora is not None) == (options.peer == "lora")
    assert (options.peer_dtype is not None) == ("(PyTorch float32)" in name)


def test_a_measured_case_ends_up_in_file_table_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"speed-{device.instruction_set().lower()}"
    results, plot = tmp_path / f"{name}.json", tmp_path / f"{name}.png"
    monkeypatch.setattr(speed, "DOCS", tmp_path)
    tiny = "configs/124m.toml --set model.num_layers=1 --set model.vocab_size=512 --steps 2"
    tiny += " --batch 1 --context 64"
    monkeypatch.setattr(speed, "cases", lambda _: {"tiny, 1 x 64": tiny})
    kept = {"tokens_per_second": 2000.0, "peak_memory_bytes": 10**9, "flops_ratio": 1.25}
    kept |= {"first_loss_seconds": 5.0, "step_seconds": 2.0}
    peer = {"tokens_per_second": 1000.0, "peak_memory_bytes": 2 * 10**9}
    peer |= {"first_loss_seconds": 11.0, "step_seconds": 4.0}
    here = {"processor": "P", "threads": 2, "instruction_set": "I", "system": "S"}
    before = {**kept, "peer": peer, "ratio": 2.0, "memory_ratio": 0.5, "day": "2026-01-01"}
    before |= {"machine": {**here, "versions": {"python": "3"}}}
    results.write_text(json.dumps({"other": before}))

    assert speed.main(["--only", "tiny"]) == 0

    found = json.loads(results.read_text())
    assert list(found) == ["other", "tiny, 1 x 64"]
    measured = found["tiny, 1 x 64"]
    assert measured["run"]["context"] == 64 and measured["tokens_per_second"] > 0
    assert measured["command"].startswith("python -m tinyllama.bench configs/124m.toml --set")
    assert plot.read_bytes().startswith(b"\x89PNG") and len(plot.read_bytes()) > 10_000
    lines = speed.report().splitlines()
    row = "| other | 2,000 | 1,000 | **2.00** | 1.00 GB | 2.00 GB | 0.50 | 1.25 | 3.0 s | 7.0 s |"
    assert row in lines
    row = f"| tiny, 1 x 64 | {measured['tokens_per_second']:,.0f} |  |  |"
    assert any(line.startswith(row) for line in lines)
    assert "On P, 2 threads, I, S; python 3; 2026-01-01:" in lines
    assert row in capsys.readouterr().out
