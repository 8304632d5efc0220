"""The benchmark: its formula, its workers and what it reports; contenders small or fake."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_helpers import SMALL_OPTIONS, resolved, small_spec

from tinyllama.bench import benchmark as command
from tinyllama.bench import report, text
from tinyllama.bench.protocol import Spec
from tinyllama.bench.runner import (
    WARM_UP_STEPS,
    contenders,
    race,
    speed_ratio,
    summarise,
    worker_command,
)
from tinyllama.bench.worker_torch import TORCH_DEVICE
from tinyllama.config import LlamaConfig, LoraConfig, load_config
from tinyllama.errors import ConfigError, TrainingError
from tinyllama.model.counts import adapter_parameters, model_flops, product_parameters
from tinyllama.system import device

# A contender that needs neither library: step i takes SECONDS[i] and the loss is the first token.
FAKE = """
import sys, time
from tinyllama.bench.protocol import Step, serve
seconds = {seconds!r}
clock = iter(t for s in seconds for t in (0.0, s))
time.perf_counter = lambda: next(clock)
class Fake:
    def describe(self):
        print("chatter that must not disturb the protocol")
        return {{"parameters": 7, "library": "fake", "device": "CPU", "device_name": "any"}}
    def step(self, tokens):
        {fault}
        return Step(float(tokens[0, 0]), 11, 2000, {device_bytes})
sys.exit(serve(lambda spec: Fake()))
"""


def fake_command(
    folder: Path,
    name: str,
    seconds: list[float],
    fault: str = "pass",
    device_bytes: int | None = None,
) -> list[str]:
    script = folder / f"{name}.py"
    script.write_text(FAKE.format(seconds=seconds, fault=fault, device_bytes=device_bytes))
    root = str(Path(command.__file__).parents[2])
    bootstrap = f"import sys, runpy; sys.path.append({root!r}); runpy.run_path({str(script)!r})"
    return [sys.executable, "-c", bootstrap]


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    return small_spec(tmp_path)


def test_model_flops_of_124m_follow_the_closed_formula() -> None:
    config = LlamaConfig.toy_124m()
    hidden, inner, layers, vocab = 768, 3072, 12, 32000
    products = layers * (4 * hidden**2 + 3 * hidden * inner) + vocab * hidden
    assert product_parameters(config) == products
    attention = 12 * layers * hidden * 512 * 1024 // 2
    assert model_flops(config, 1024, 512) == 6 * products * 1024 + attention


def test_a_tied_head_costs_as_much_as_an_untied_one() -> None:
    tied = LlamaConfig(tie_word_embeddings=True)
    assert model_flops(tied, 64, 32) == model_flops(LlamaConfig(), 64, 32)


def test_grouped_queries_shrink_the_key_and_value_products_alone() -> None:
    grouped = LlamaConfig(num_kv_heads=4)
    saved = 12 * 2 * 768 * (768 - 4 * 64)
    assert product_parameters(LlamaConfig()) - product_parameters(grouped) == saved


def test_lora_flops_skip_the_frozen_weights_gradients() -> None:
    config, lora = LlamaConfig.toy_124m(), LoraConfig(rank=16)
    assert adapter_parameters(config, lora) == 1_179_648
    full = model_flops(config, 512, 512)
    frozen = 2 * product_parameters(config) * 512
    assert model_flops(config, 512, 512, lora) == full - frozen + 6 * 1_179_648 * 512


def test_medians_leave_the_warm_up_out(tmp_path: Path, spec: Spec) -> None:
    ours = fake_command(tmp_path, "ours", [9.0, 8.0, 2.0, 1.0, 4.0])
    peer = fake_command(tmp_path, "peer", [9.0, 8.0, 3.0, 4.0, 4.0])
    order: list[tuple[str, int]] = []
    workers = race(
        {"ours": ours, "peer": peer},
        {"ours": spec, "peer": spec},
        3,
        lambda name, index, answer: order.append((name, index)),
    )
    assert order[2:] == [(name, i) for i in range(1, 5) for name in ("ours", "peer")]
    result = summarise(workers[0], spec, 1000)
    assert result["step_seconds"] == 2.0
    assert result["tokens_per_second"] == 2 * 32 / 2.0
    assert (result["step_seconds_min"], result["step_seconds_max"]) == (1.0, 4.0)
    assert result["second_step_seconds"] == 8.0
    assert result["flops_ratio"] == 2.0 and result["kernels_per_step"] == 11
    assert result["peak_memory_bytes"] > 1e6 and result["parameters"] == 7
    # 3/2, 4/1 and 4/4 in pairs; the ratio of the medians would be 2.
    assert speed_ratio(*workers) == 1.5
    assert speed_ratio(workers[1], workers[0]) == pytest.approx(2 / 3)


def test_memory_is_that_of_the_device_where_it_has_its_own(tmp_path: Path, spec: Spec) -> None:
    there = fake_command(tmp_path, "there", [1.0] * 3, device_bytes=123)
    worker = race({"there": there}, {"there": spec}, 1)[0]
    assert summarise(worker, spec, 1000)["peak_memory_bytes"] == 123


def test_the_peer_is_on_our_device(spec: Spec) -> None:
    assert spec.device == "CPU"
    places = [TORCH_DEVICE.get(name, "cpu") for name in ("CPU", "CL", "CUDA", "METAL")]
    assert places == ["cpu", "cpu", "cuda", "mps"]


def test_contenders_are_given_the_same_batches(tmp_path: Path, spec: Spec) -> None:
    commands = {name: fake_command(tmp_path, name, [1.0] * 5) for name in ("a", "b")}
    a, b = race(commands, dict.fromkeys(commands, spec), 3)
    expected = np.load(spec.data)[:, 0, 0].tolist()
    assert [answer.loss for answer in a.answers] == expected
    assert [answer.loss for answer in b.answers] == expected
    assert WARM_UP_STEPS == 2


def test_a_worker_that_fails_is_named_with_its_reason(tmp_path: Path, spec: Spec) -> None:
    broken = fake_command(tmp_path, "broken", [1.0] * 5, "raise ValueError('no such luck')")
    with pytest.raises(TrainingError, match=r"worker 'x': ValueError: no such luck"):
        race({"x": broken}, {"x": spec}, 1)
    dead = fake_command(tmp_path, "dead", [1.0] * 5, "import os; os._exit(3)")
    with pytest.raises(TrainingError, match=r"worker 'x': ended with exit code 3"):
        race({"x": dead}, {"x": spec}, 1)
    with pytest.raises(TrainingError, match=r"cannot start /nowhere/python: No such file"):
        race({"x": ["/nowhere/python"]}, {"x": spec}, 1)


def test_a_missing_torch_says_what_to_install(spec: Spec) -> None:
    code = worker_command(sys.executable, "tinyllama.bench.worker_torch")
    code[2] = "import sys; sys.modules['torch'] = None\n" + code[2]
    with pytest.raises(TrainingError, match=r"pip install 'tinyllama-trainer\[bench\]'"):
        race({"peer": code}, {"peer": spec}, 1)


def test_the_peer_needs_none_of_our_dependencies() -> None:
    code = worker_command(sys.executable, "tinyllama.bench.worker_torch")[2]
    code = code.replace('None, "__main__"', 'None, "peer"')
    code += "\nprint([m for m in ('tinygrad', 'msgspec', 'tomli', 'tqdm') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_a_file_alone_is_cut_down_to_512_tokens_a_step() -> None:
    config = resolved()
    assert (config.training.micro_batch, config.context_length) == (1, 512)
    config = resolved("--context", "128")
    assert (config.training.micro_batch, config.context_length) == (4, 128)


def test_requested_sizes_are_kept() -> None:
    config = resolved("--set", "training.batch_size=4", "--set", "data.context_length=1024")
    assert (config.training.micro_batch, config.context_length) == (4, 1024)
    config = resolved("--batch", "3", "--context", "700", "--dtype", "bfloat16")
    assert (config.training.batch_size, config.context_length) == (3, 700)
    assert config.training.accumulation_steps == 1 and config.training.dtype == "bfloat16"


def test_a_context_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--context: got 4096, must be at most .* 2048"):
        resolved("--context", "4096")


def test_a_user_mistake_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["configs/nowhere.toml"]) == 2
    assert capsys.readouterr().err == (
        "configs/nowhere.toml: no such file; configurations by name: 124m, 7b, demo or lora\n"
    )
    with pytest.raises(SystemExit) as stop:
        command.main(["--steps", "0"])
    assert stop.value.code == 2
    assert "--steps: got '0', must be 1 or more" in capsys.readouterr().err


def test_the_peer_receives_hugging_face_names(spec: Spec) -> None:
    assert spec.model["num_key_value_heads"] == 2
    assert spec.model["num_hidden_layers"] == 2
    assert Spec.from_json(spec.to_json()) == spec
    assert load_config("configs/124m.toml").model.num_layers == 12


def test_without_a_tokenizer_the_text_is_bytes_of_the_standard_library() -> None:
    rows, name = text.batches(resolved(*SMALL_OPTIONS), 3, 2, 32)
    assert rows.shape == (3, 2, 33) and rows.dtype == np.int32
    assert bytes(rows[0, 0].astype(np.uint8)).isascii()
    assert name == "source of Python's standard library, one id per byte"


def test_a_short_text_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text("é!", encoding="utf-8")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    rows, _ = text.batches(resolved(*SMALL_OPTIONS), 1, 1, 6)
    assert rows.tolist() == [[[195, 169, 33, 195, 169, 33, 195]]]


def test_the_peer_runs_in_the_interpreter_that_was_named() -> None:
    assert list(contenders(None, None)) == ["tinyllama"]
    commands = contenders("torch", "/opt/torch/bin/python")
    assert list(commands) == ["tinyllama", "peer"]
    assert commands["tinyllama"][0] == sys.executable
    assert commands["peer"][0] == "/opt/torch/bin/python"


def test_our_worker_trains_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    code = command.main(["configs/124m.toml", *SMALL_OPTIONS, "--steps", "2", "--json"])
    assert code == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result["device"] == "CPU"
    assert result["parameters"] == 2 * 300 * 64 + 2 * (64 * (2 * 64 + 2 * 32 + 3 * 96)) + 5 * 64
    assert result["first_loss"] == pytest.approx(math.log(300), abs=0.1)
    assert result["last_loss"] < result["first_loss"]
    assert result["tokens_per_second"] == pytest.approx(64 / result["step_seconds"])
    assert result["kernels_per_step"] > 30
    assert 0.9 < result["flops_ratio"] < 1.5  # small sizes: what the formula leaves out shows
    assert result["first_loss_seconds"] > result["second_step_seconds"]
    assert "peer" not in result and "ratio" not in result
    shown = report.text(result)
    assert "2 x 32 tokens per step, float32" in shown
    assert result["machine"]["processor"] in shown


def test_a_lora_section_trains_the_adapters_alone(capsys: pytest.CaptureFixture[str]) -> None:
    adapters = ["--set", "lora.rank=4", "--set", "lora.target_modules=all-linear"]
    steps = ["--steps", "1", "--json"]
    code = command.main(["configs/124m.toml", *SMALL_OPTIONS, *adapters, *steps])
    assert code == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    sides = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96)
    assert result["trainable"] == 2 * 4 * sides
    assert result["parameters"] == 2 * 300 * 64 + 2 * (64 * (2 * 64 + 2 * 32 + 3 * 96)) + 5 * 64
    full = model_flops(resolved(*SMALL_OPTIONS).model, 64, 32)
    assert result["run"]["model_flops"] < full


def test_qlora_is_compared_with_our_lora(capsys: pytest.CaptureFixture[str]) -> None:
    adapters = ["--set", "lora.rank=4", "--set", "qlora.block_size=32"]
    steps = ["--steps", "2", "--json", "--peer", "lora"]
    assert command.main(["configs/124m.toml", *SMALL_OPTIONS, *adapters, *steps]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    peer = result["peer"]
    assert result["library"] == f"{peer['library']}, int4"
    assert result["trainable"] == peer["trainable"] and result["parameters"] == peer["parameters"]
    # The same weights, but for the 4 bits of them, on the same text.
    assert result["first_loss"] == pytest.approx(peer["first_loss"], rel=1e-3)
    assert result["first_loss"] != peer["first_loss"]
    assert result["last_loss"] < result["first_loss"]
    assert result["ratio"] > 0 and result["memory_ratio"] > 0


@pytest.mark.parametrize("extra", [[], ["qlora.quantize_base=false"], ["lora.rank=4"]])
def test_without_a_packed_base_there_is_no_qlora_to_compare(
    capsys: pytest.CaptureFixture[str], extra: list[str]
) -> None:
    words = [word for override in extra for word in ("--set", override)]
    code = command.main(["configs/124m.toml", *SMALL_OPTIONS, *words, "--peer", "lora"])
    assert code == 2
    assert capsys.readouterr().err == (
        "--peer lora: compares QLoRA with LoRA: set [lora] and [qlora]\n"
    )


def test_single_operations_have_no_lora_to_compare_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["configs/124m.toml", "--ops", "--peer", "lora"]) == 2
    assert capsys.readouterr().err.startswith("--ops: single operations have no --peer lora")


def test_the_table_shows_both_contenders_and_the_ratio(tmp_path: Path, spec: Spec) -> None:
    names = ("ours", "peer")
    commands = {name: fake_command(tmp_path, name, [1.0] * 5) for name in names}
    workers = race(commands, dict.fromkeys(names, spec), 3)
    result = summarise(workers[0], spec, 1000)
    peer = {**summarise(workers[1], spec, 1000), "flops_ratio": None}
    run = {"config": "c.toml", "batch": 2, "context": 32, "dtype": "float32", "steps": 3}
    versions = {"python": "3"}
    machine = {
        "load_average": 4.0,
        "processor": "P",
        "threads": 2,
        "instruction_set": "AVX2",
        "system": "Linux",
    }
    result |= {"peer": peer, "ratio": 1.25, "memory_ratio": 0.5, "data": "d"}
    result |= {"run": run | {"warm_up_steps": 2}, "machine": machine | {"versions": versions}}
    shown = report.text(result).splitlines()
    cells = [line.rsplit(maxsplit=2) for line in shown]
    assert ["tokens per second", "64.0", "64.0"] in cells
    assert ["FLOPs executed /", "model's", "2.000"] in cells  # the peer cannot tell its own
    assert "tinyllama is 1.25 times as fast as the peer" in shown
    assert any(line.startswith("warning: the machine was busy (load 4.0") for line in shown)
    assert "and its peak memory is 0.50 of the peer's" in shown
    result["machine"]["load_average"] = 0.1
    del result["memory_ratio"]
    assert "warning" not in report.text(result) and "peak memory is" not in report.text(result)


def test_memory_is_compared_on_one_device_alone() -> None:
    ours, peer = (
        {"device": "CPU", "peak_memory_bytes": 3},
        {"device": "CPU", "peak_memory_bytes": 4},
    )
    assert command._memory_ratio(ours, peer) == {"memory_ratio": 0.75}
    assert command._memory_ratio(ours | {"device": "CL"}, peer) == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_each_operation_is_timed_beside_numpy(dtype: str) -> None:
    from tinyllama.bench import operations, ops

    config = resolved(*SMALL_OPTIONS, "--dtype", dtype)
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(operations, "SECONDS_EACH", 0.0)
        found = ops.measure(config, device.threads(), None)
    labels = [entry["operation"] for entry in found]
    assert labels[0] == "matmul x W^T 64 x 64 x 64"
    assert "attention both 2 x 32 x 4 x 2 x 16" in labels and len(set(labels)) == len(labels)
    assert {"rope both 2 x 32 x 4 x 2 x 16", "embedding both 64 x 300 x 64"} <= {*labels}
    assert any(label.startswith("int4 both 64 x ") for label in labels)
    assert found[0]["flops"] == 2 * 64**3
    assert all(entry["gflops"]["tinyllama"] > 0 for entry in found)
    assert found[0]["gflops"]["numpy"] > 0 and found[-1]["seconds"]["numpy"] is None
    assert ops.text(found).splitlines()[0].split()[-2:] == ["tinyllama", "numpy"]
