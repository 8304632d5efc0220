"""A profile: times that add up, right lines of the model, and files that their programs open."""

import inspect
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from fake_cuda import needs_nvrtc, variables
from model_helpers import SQUARE, build, random_batch
from opencl import needs_opencl
from runs_helpers import ROOT, configuration, environment, finished_run
from tinygrad.uop.ops import Ops

from tinyllama.cli.profile import _write_tables
from tinyllama.cli.shared import load
from tinyllama.config import TrainingConfig, load_config
from tinyllama.model import llama, lora
from tinyllama.reports import profile_files, roofline
from tinyllama.reports.profile import (
    DATA,
    GAPS,
    PYTHON,
    Measured,
    profile_generation,
    profile_training,
    summarize,
)
from tinyllama.reports.runs import read_run
from tinyllama.runtime import sources, threads, timing
from tinyllama.runtime.recording import recording
from tinyllama.runtime.timing import Kernel, Part, Run
from tinyllama.train.optimizer import AdamW
from tinyllama.train.run_folder import write_config
from tinyllama.train.step import TrainStep

STEPS = 3


def line_of(function, text: str, file: str = "model/llama.py") -> str:
    """The line of a function in which `text` stands, as a profile names it."""
    lines, first = inspect.getsourcelines(function)
    (number,) = [first + at for at, line in enumerate(lines) if text in line]
    return f"tinyllama/{file}:{number}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The profile of a small model's training, and the wall time of a step by another clock."""
    run = tmp_path_factory.mktemp("profiled") / "run"
    config = configuration(run, "training.batch_size=24", "data.context_length=48")
    return profile_training(config, STEPS, pytest.fail)


def with_source(profile, line: str, name: str, backward: bool = False):
    return [
        o for o in profile.operations
        if line in o.source and o.name.startswith(name) and ("backward)" in o.name) is backward
    ]  # fmt: skip


def test_shares_add_up_to_the_steps_wall_time(trained):
    assert sum(o.share for o in trained.operations) == pytest.approx(1, abs=0.03)
    seconds = sum(o.seconds for o in trained.operations)
    assert seconds == pytest.approx(trained.step_seconds, rel=0.03)
    for step in trained.steps:
        inside = [run for run in step.runs if step.data_end <= run.begin <= run.end <= step.end]
        assert len(inside) == len(step.runs) > 50
        assert all(a.end <= b.begin for a, b in itertools.pairwise(step.runs))


def test_hot_operations_come_first_and_the_rest_last(trained):
    *kernels, gaps, python, data = trained.operations
    assert [o.name for o in (gaps, python, data)] == [GAPS, PYTHON, DATA]
    assert all(a.seconds >= b.seconds for a, b in itertools.pairwise(kernels))
    assert len(trained.steps) == STEPS


@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj"])
def test_products_name_the_line_of_their_layer_forward_and_back(trained, projection):
    line = line_of(llama.Attention.project, f"self.{projection}(x)")
    (forward,) = with_source(trained, line, "gemm")
    assert forward.calls == 2  # layers
    backward = with_source(trained, line, "gemm", backward=True)
    assert sum(o.calls for o in backward) == 4  # of the input and of the weight, in each layer
    rows, width = 24 * 48, 64 if projection == "q_proj" else 32
    assert forward.flops == 2 * (2 * rows * 64 * width)


def test_products_of_the_head_name_the_models_line_forward_and_back(trained):
    line = line_of(llama.Llama.through_head, "return make()")
    (forward,) = with_source(trained, line, "gemm")
    backward = with_source(trained, line, "gemm", backward=True)
    assert forward.calls == 1 and sum(o.calls for o in backward) == 2  # of hidden, of the weight
    rows = 24 * 48
    assert forward.flops == 2 * rows * 64 * 400 == backward[0].flops


def test_attention_and_norms_name_their_lines(trained):
    line = line_of(llama.Attention.__call__, "attention(*self.project(x), starts, (cos, sin))")
    assert with_source(trained, line, "attention_forward")
    assert with_source(trained, line, "attention_backward", backward=True)
    norm = line_of(llama.Block.__call__, "self.input_layernorm(x)")
    assert with_source(trained, norm, "rms_norm_forward")
    assert with_source(trained, norm, "rms_norm_backward", backward=True)


def test_a_fused_kernel_names_all_lines_that_it_computes(trained):
    first = line_of(llama.Block.__call__, "self.input_layernorm(x)")
    second = line_of(llama.Block.__call__, "return h + self.mlp(")
    fused = [o for o in trained.operations if o.name.startswith("E_") and "backward" not in o.name]
    assert any({first, second} <= set(o.source) for o in fused)


def test_every_kernel_of_a_training_step_has_a_line(trained):
    assert [o.name for o in trained.operations[:-3] if not o.source] == []
    pattern = re.compile(r"tinyllama/(model|train)/\w+\.py:\d+")
    sources = [line for o in trained.operations for line in o.source]
    assert all(pattern.fullmatch(line) for line in sources)
    assert all((ROOT / line.partition(":")[0]).is_file() for line in sources)


def test_adapters_and_packed_weights_name_their_own_lines(tmp_path):
    final = finished_run() / "final"
    config = configuration(
        tmp_path / "run",
        "lora.rank=4",
        f'model.base="{final}"',
        "qlora.block_size=32",
    )
    profile = profile_training(config, 1, pytest.fail)
    down = line_of(lora.LoRALinear.__call__, "self.lora_A(", "model/lora.py")
    assert with_source(profile, down, "gemm") and with_source(profile, down, "gemm", backward=True)
    assert any("tinyllama/model/int4.py" in line for o in profile.operations for line in o.source)
    assert sum(o.share for o in profile.operations) == pytest.approx(1, abs=0.03)


def test_generation_is_profiled_by_token():
    _, model = load(finished_run() / "final", None)
    profile = profile_generation(model, [1, 5, 6, 7], STEPS)
    assert sum(o.share for o in profile.operations) == pytest.approx(1, abs=0.03)
    line = line_of(llama.Attention.cached, "cached_attention(q, k, v")
    (attention,) = with_source(profile, line, "cached_attention")
    assert attention.calls == 2
    assert len(profile.steps) == STEPS


def example():
    """Two steps of known times."""
    product = Kernel("gemm_8", ("tinyllama/model/layers.py:5", "tinyllama/model/llama.py:9"),
                     False, 4_000_000, 1_000_000)  # fmt: skip
    back = Kernel("gemm_8", ("tinyllama/model/llama.py:9",), True, 2_000_000, 500_000)
    steps = []
    for at in (10.0, 11.0):
        parts = (Part(0, at + 0.2, at + 0.4), Part(1, at + 0.2, at + 0.5))
        runs = (Run(product, at + 0.2, at + 0.5, parts), Run(back, at + 0.6, at + 0.7))
        steps.append(Measured(at, at + 0.05, at + 1.0, runs))
    return summarize("a step", steps)


def test_seconds_shares_and_speeds_are_those_of_the_runs():
    profile = example()
    rows = {o.name: o for o in profile.operations}
    assert profile.step_seconds == pytest.approx(1.0)
    forward, back = rows["gemm_8"], rows["gemm_8 (backward)"]
    assert (forward.calls, forward.seconds) == (1, pytest.approx(0.3))
    assert forward.gflops == pytest.approx(4e6 / 0.3 / 1e9)
    assert forward.gb_per_second == pytest.approx(1e6 / 0.3 / 1e9)
    assert back.share == pytest.approx(0.1)
    assert rows[GAPS].seconds == pytest.approx(0.1)
    assert rows[PYTHON].seconds == pytest.approx(0.15 + 0.3)
    assert rows[DATA].seconds == pytest.approx(0.05)
    assert "100.0%" in profile.table()


def test_the_trace_has_complete_events_of_the_trace_event_format(tmp_path):
    file = tmp_path / "trace.json"
    profile_files.write_trace(example(), file)
    events = json.loads(file.read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["tid"]}
    assert set(names.values()) == {"steps", "kernels", "thread 0", "thread 1"}
    slices = [e for e in events if e["ph"] == "X"]
    assert all({"name", "cat", "pid", "tid", "ts", "dur"} <= set(e) for e in slices)
    kernels = [e for e in slices if names[e["tid"]] == "kernels"]
    assert [e["ts"] for e in kernels] == pytest.approx([2e5, 6e5, 12e5, 16e5])
    assert [e["dur"] for e in kernels] == pytest.approx([3e5, 1e5, 3e5, 1e5])
    assert kernels[0]["args"]["source"].endswith("tinyllama/model/llama.py:9")
    assert kernels[1]["args"]["pass"] == "backward"


def test_the_flame_graph_follows_speedscopes_schema(tmp_path):
    file = tmp_path / "profile.speedscope.json"
    profile_files.write_speedscope(example(), file)
    document = json.loads(file.read_text())
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "tests/helpers/speedscope_schema.json").read_text())
    jsonschema.validate(document, schema)
    (flame,) = document["profiles"]
    frames = [frame["name"] for frame in document["shared"]["frames"]]
    stacks = [[frames[place] for place in sample] for sample in flame["samples"]]
    assert stacks[0] == [
        "step", "forward", "tinyllama/model/llama.py:9", "tinyllama/model/layers.py:5", "gemm_8",
    ]  # fmt: skip
    assert sum(flame["weights"]) == pytest.approx(2.0) == flame["endValue"]


def test_the_roofline_is_drawn_with_ceilings_and_operations(tmp_path):
    picture = tmp_path / "roofline.svg"
    roofline.draw_roofline(example(), roofline.Ceilings(100.0, 200.0, 20.0), picture)
    text = picture.read_text()
    assert "<svg" in text and picture.stat().st_size > 5000
    (forward, back) = roofline.points(example())
    assert (forward.flops / forward.nbytes, back.flops / back.nbytes) == (4.0, 4.0)


def test_ceilings_are_at_least_what_the_operations_reach(trained):
    ceilings = roofline.measure_ceilings()
    products = [o.gflops for o in trained.operations if o.name.startswith("gemm")]
    assert ceilings.float32 > 0.3 * max(products)
    assert 0.5 < ceilings.gb_per_second < 5000


def command(*words: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tinyllama", "profile", *words],
        capture_output=True, text=True, env=environment(**variables), cwd=ROOT,
    )  # fmt: skip


SMALL = [
    word
    for option in (
        "model.vocab_size=256", "model.hidden_size=64", "model.num_layers=1", "model.num_heads=2",
        "model.intermediate_size=128", "model.max_seq_len=32", "training.batch_size=2",
        "data.context_length=32",
        'data.train_path="none/such"', "data.val_path=none",
    )
    for word in ("--set", option)
]  # fmt: skip


def test_the_command_prints_the_documented_object_and_writes_its_files(tmp_path):
    done = command("124m", *SMALL, "--steps", "2", "--json", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"step_seconds", "operations"}
    keys = {"name", "source", "calls", "seconds", "share", "gflops", "gb_per_second"}
    assert all(set(operation) == keys for operation in report["operations"])
    assert sum(o["share"] for o in report["operations"]) == pytest.approx(1, abs=0.03)
    assert "random tokens" in done.stderr
    names = {"profile.json", "trace.json", "profile.speedscope.json", "roofline.json"}
    names |= {"roofline.svg", "roofline.png"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    assert json.loads((tmp_path / "out" / "profile.json").read_text()) == report


def test_a_profile_is_kept_beside_the_run_of_the_same_model_where_its_report_finds_it(tmp_path):
    run, other = tmp_path / "run", "model.intermediate_size=192"
    words = [*SMALL, "--set", f"checkpointing.checkpoint_dir={str(run)!r}", "--steps", "1"]
    options = [word for word in words if "=" in word]
    run.mkdir()
    write_config(run, load_config("124m", options))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n')
    done = command("124m", *words, "--set", other)
    assert done.returncode == 0 and not (run / "profile.json").exists()
    done = command("124m", *words, "--json")
    assert done.returncode == 0 and f"`tinyllama report {run}` shows it" in done.stderr
    found = read_run(run).profile
    assert msgspec.to_builtins(found) == json.loads(done.stdout)
    assert any(operation.source for operation in found.operations)
    measured = json.loads((run / "roofline.json").read_text())
    assert msgspec.to_builtins(read_run(run).ceilings) == measured
    assert "ceilings: float32" in done.stderr


def test_a_run_that_cannot_be_read_costs_no_profile(tmp_path):
    (tmp_path / "config.toml").write_text("[of_another_version]\n")
    place = f"checkpointing.checkpoint_dir={str(tmp_path)!r}"
    done = command("124m", *SMALL, "--set", place, "--steps", "1", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["operations"]
    assert f"; the profile is not kept in {tmp_path}" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


def test_a_profile_is_kept_through_no_link(tmp_path):
    """A run's folder may come from somebody else."""
    (tmp_path / "precious").write_text("precious")
    for name in ("profile.json", "roofline.json"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    content = SimpleNamespace(as_dict=lambda: {"a": 1})
    _write_tables(content, content, tmp_path)
    assert (tmp_path / "precious").read_text() == "precious"
    assert json.loads((tmp_path / "roofline.json").read_text()) == {"a": 1}


def test_a_command_that_names_neither_or_both_is_refused():
    for words in ((), ("124m", "--generate", "model")):
        done = command(*words)
        assert done.returncode == 2 and "--generate MODEL" in done.stderr
        assert len(done.stderr.splitlines()) == 1


@needs_opencl
def test_opencl_is_timed_by_the_events_of_its_queue():
    done = command("124m", *SMALL, "--steps", "2", "--json", DEV="CL")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert sum(o["share"] for o in report["operations"]) == pytest.approx(1, abs=0.03)
    assert any("llama.py" in line for o in report["operations"] for line in o["source"])


@needs_nvrtc
@pytest.mark.parametrize("more", [[], ["--set", "lora.rank=4"]], ids=["full", "lora"])
def test_cuda_is_timed_by_events_between_the_launches(tmp_path, more):
    done = command(
        "124m", *SMALL, *more, "--steps", "1", "--json", DEV="CUDA", **variables(tmp_path / "log")
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [o for o in json.loads(done.stdout)["operations"] if o["calls"]]
    # The fake driver says that a millisecond passed between any two events.
    assert all(o["seconds"] == pytest.approx(1e-3 * o["calls"]) for o in kernels)
    assert any(o["name"].startswith("gemm") and o["source"] for o in kernels)
    assert [o["name"] for o in kernels if not o["source"]] == []
    products = [o for o in kernels if o["name"].startswith("gemm")]
    assert all(all("/model/" in line for line in o["source"]) for o in products)
    assert sum("(backward)" in o["name"] for o in products) > len(products) / 2


def test_nothing_is_noted_while_nothing_is_recorded(monkeypatch):
    assert timing.recorder() is None and not sources.tracking()
    monkeypatch.setattr(sources, "stack_lines", lambda: pytest.fail("Python's stack was walked"))
    monkeypatch.setattr(threads.TimedTable, "__init__", lambda *_: pytest.fail("a timed table"))
    model = build(SQUARE)
    step = TrainStep(model, AdamW(model.state_dict(), TrainingConfig()), 1)
    step([random_batch(SQUARE)], 1, 0.01)


def launched(step: TrainStep) -> list[str]:
    """The texts of the kernels of a captured step, in the order in which it launches them."""
    calls = [call.src[0] for call in step._whole.captured.linear.src]
    graphs = [call.src[0].src if call.op is Ops.CUSTOM_FUNCTION else [call] for call in calls]
    kernels = [kernel for graph in graphs for kernel in graph]
    return [u.arg for kernel in kernels for u in kernel.toposort() if u.op is Ops.SOURCE]


def called(step: TrainStep, batch) -> list[str]:
    """The files of the Python functions that a step calls, one for each call."""
    files: list[str] = []

    def note(frame, event, _):
        if event == "call":
            files.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        step([batch], 4, 0.01)
    finally:
        sys.setprofile(None)
    return files


def test_a_step_that_is_not_recorded_is_the_same_as_in_a_process_that_never_records():
    def made(steps: int) -> TrainStep:
        model = build(SQUARE)
        step = TrainStep(model, AdamW(model.state_dict(), TrainingConfig()), 1)
        for number in range(1, 1 + steps):
            step([batch], number, 0.01)
        return step

    batch = random_batch(SQUARE)
    before = made(3)
    with recording() as recorder:
        recorded = made(3)
        with_recorder = called(recorded, batch)
        assert recorder.take()
    after = made(3)
    assert len(launched(before)) > 20
    assert launched(before) == launched(after) == launched(recorded)
    plain = called(before, batch)
    assert plain == called(after, batch)
    files = {Path(file).name for file in plain}
    assert not files & {"timing.py", "sources.py", "recording.py", "profile.py"}
    assert len(with_recorder) > len(plain)
