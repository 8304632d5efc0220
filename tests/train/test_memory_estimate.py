"""The memory estimate beside what real runs take, and what is done with it before a run."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lora_helpers import write_base
from model_helpers import SQUARE, build, on_device, random_batch
from runs_helpers import ROOT, TRAIN_FILES, shared_folder, tokenizer, tool
from tinygrad import dtypes
from tinygrad.helpers import GlobalCounters
from tinygrad.uop.ops import Ops

from tinyllama.cli import app
from tinyllama.config import (
    Config,
    DataConfig,
    LlamaConfig,
    LoraConfig,
    TrainingConfig,
)
from tinyllama.errors import ConfigError, TrainingError
from tinyllama.ops import forms
from tinyllama.runtime.capture import captured
from tinyllama.runtime.cpu import cpu_device
from tinyllama.system import memory
from tinyllama.train.gradients import StagedLoss
from tinyllama.train.memory_estimate import estimate_memory
from tinyllama.train.micro_batch import largest_micro_batch, plan_run, verdict
from tinyllama.train.optimizer import AdamW
from tinyllama.train.step import TrainStep

SMALL = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    intermediate_size=768,
    max_seq_len=256,
)
LARGE = replace(SMALL, hidden_size=512, num_layers=6, num_heads=8, intermediate_size=1408)
BATCHES = {"small": (SMALL, 4, 128), "large": (LARGE, 2, 256)}
LORA = "[lora]\nrank = 8\n"
KINDS = {"full": "", "lora": LORA, "qlora": f"{LORA}[qlora]\nblock_size = 64\n"}
KINDS["qlora, recomputed"] = KINDS["qlora"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Checkpoints to fine-tune, one of each size."""
    folder = tmp_path_factory.mktemp("bases")
    return {name: write_base(folder / name, BATCHES[name][0]) for name in BATCHES}


def run_text(size, kind, folder, bases):
    """A TOML configuration of two steps."""
    model, batch, context = BATCHES[size]
    sizes = {k: v for k, v in model.__dict__.items() if v is not None}
    sizes["tie_word_embeddings"] = False
    base = chosen = ""  # a base has its own tokenizer
    if kind == "full":
        tokenizer()
        chosen = f'tokenizer = "{shared_folder() / "tokenizer.model"}"'
    else:
        base = f'base = "{bases[size]}"'
    return f"""
[model]
{base}
{chr(10).join(f"{key} = {json.dumps(value)}" for key, value in sizes.items())}
[training]
batch_size = {batch}
max_steps = 2
checkpoint_activations = {"true" if "recomputed" in kind else "false"}
[data]
train_path = {json.dumps(TRAIN_FILES)}
{chosen}
context_length = {context}
cache_dir = "{folder / "cache"}"
[checkpointing]
checkpoint_dir = "{folder / "run"}"
{KINDS[kind]}"""


@pytest.mark.parametrize("size", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_run_takes_what_was_estimated(size, kind, tmp_path, bases):
    text = run_text(size, kind, tmp_path, bases)
    (tmp_path / "run.toml").write_text(text)
    result = tmp_path / "result.json"
    script = str(ROOT / "tests" / "helpers" / "memory_run.py")
    words = [sys.executable, script, str(result), "train", str(tmp_path / "run.toml")]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environ, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    rows = re.findall(r"^(\S.*?) +(-?[\d,]+) +-?[\d.]+ GB$", done.stdout, re.MULTILINE)
    printed = {label: int(number.replace(",", "")) for label, number in rows}
    total = printed["total"]
    tensors = total - printed["interpreter, libraries, graphs"]
    assert found["tensors"] == pytest.approx(tensors, rel=0.01)
    assert found["resident"] == pytest.approx(total, rel=0.10)
    assert "\nfits: " in done.stdout


@pytest.fixture
def same_runtime(monkeypatch):
    """What the process itself takes is measured, so it is never twice the same."""
    monkeypatch.setattr("tinyllama.train.memory_estimate._runtime_bytes", lambda _: 150_000_000)


def config(model=SQUARE, val_path=None, **training):
    return Config(
        model=model,
        training=TrainingConfig(**{"batch_size": 2, **training}),
        data=DataConfig(context_length=32, val_path=val_path),
    )


def arena_bytes(jit):
    """Bytes of the memory that a captured graph has for its own tensors."""
    found = jit.captured.linear.toposort()
    bases = {u.src[0] for u in found if u.op is Ops.BUFFER_VIEW}
    return sum(u.arg for u in bases if u.op is Ops.BUFFER and u.dtype == dtypes.int8)


@pytest.mark.parametrize("chunks", [1, 4])
def test_the_arena_of_a_real_step_is_the_planned_one_to_the_byte(chunks, monkeypatch):
    elements = 2 * 32 * SQUARE.vocab_size // chunks
    monkeypatch.setattr("tinyllama.ops.cross_entropy.CHUNK_ELEMENTS", elements)
    asked = config(val_path="validation")
    model = build(SQUARE)
    optimizer = AdamW(model.state_dict(), asked.training)
    step = TrainStep(model, optimizer, 1)
    batch = random_batch(SQUARE, rows=2, length=32)
    step([batch], 1, 1e-3)
    loss = captured(StagedLoss(model).loss)
    loss(*on_device(batch))
    arenas = arena_bytes(step._whole) + arena_bytes(loss)
    expected = estimate_memory(asked)
    lasting = expected.weights + expected.optimizer_state
    given = 3 * 2 * 32 * 4 + 8 * 4 + 32 * SQUARE.head_dim * 4  # batch, scalars, rotary tables
    assert expected.tensors == lasting + given + arenas
    assert expected.gradients == expected.weights


def test_a_step_in_micro_batches_keeps_sums_of_gradients():
    whole, parts = (estimate_memory(config(micro_batch_size=size)) for size in (2, 1))
    assert whole.gradients == whole.weights
    assert parts.gradients == 2 * parts.weights
    assert parts.activations < whole.activations
    asked = config(micro_batch_size=1)
    model = build(SQUARE)
    step = TrainStep(model, AdamW(model.state_dict(), asked.training), 2)
    batches = [random_batch(SQUARE, rows=1, length=32, seed=seed) for seed in (1, 2)]
    step(batches, 1, 1e-3)
    arenas = arena_bytes(step._accumulate) + arena_bytes(step._update)
    lasting = 4 * parts.weights  # and two moments, and the sums
    given = 3 * 32 * 4 + 8 * 4 + 32 * SQUARE.head_dim * 4
    assert parts.tensors == lasting + given + arenas


def test_planning_allocates_nothing_and_compiles_nothing(monkeypatch):
    def refuse(*_):
        raise AssertionError("a kernel was compiled")

    monkeypatch.setattr(type(cpu_device().compiler), "compile", refuse)
    before = GlobalCounters.mem_used
    found = estimate_memory(config(replace(SMALL, num_layers=1, vocab_size=77), batch_size=3))
    assert found.tensors > 10_000_000
    assert GlobalCounters.mem_used - before < 100_000  # the rotary tables


def test_every_number_is_there_and_they_add_up():
    found = estimate_memory(config())
    parts = found.as_dict()
    assert parts["reused"] < 0
    assert min(v for k, v in parts.items() if k != "reused") >= 0
    sums = ("tensors", "total", "micro_batch_size", "context_length")
    assert sum(v for k, v in parts.items() if k not in sums) == found.total == parts["total"]
    assert found.total - found.runtime == found.tensors
    assert found.table().splitlines()[-1].split()[:2] == ["total", f"{found.total:,}"]
    assert (found.micro_batch_size, found.context_length) == (2, 32)


def test_the_process_itself_is_measured():
    found = estimate_memory(config())
    now = memory.resident_bytes()
    assert 17_000_000 < found.runtime < now + 20_000_000
    assert found.runtime > now - GlobalCounters.mem_used - 30_000_000


def test_what_saves_memory_is_seen_to():
    plain = estimate_memory(config(SMALL))
    again = estimate_memory(config(SMALL, checkpoint_activations=True))
    assert again.activations < plain.activations / 2
    narrow = estimate_memory(config(SMALL, dtype="bfloat16"))
    assert 0.4 < narrow.activations / plain.activations < 0.7
    assert narrow.weights == plain.weights


def test_memory_grows_linearly_with_the_context(same_runtime):
    """No T x T matrix of scores is kept, or made, anywhere."""
    asked = config(SMALL, batch_size=1)
    contexts = [replace(asked, data=DataConfig(context_length=length)) for length in (64, 128, 256)]
    for kind in ("activations", "workspace"):
        small, middle, large = (getattr(estimate_memory(c), kind) for c in contexts)
        assert large - middle <= 2.05 * (middle - small) + 4096, kind
    assert large > small


def test_memory_grows_with_the_batch_by_activations_alone():
    one, two, four = (estimate_memory(config(SMALL, batch_size=n)) for n in (1, 2, 4))
    assert two.activations == pytest.approx(2 * one.activations, rel=0.01)
    assert four.activations == pytest.approx(4 * one.activations, rel=0.01)
    assert one.gradients == four.gradients == one.weights


def test_validation_is_planned_without_the_dropout_of_adapters():
    """It runs without: what it adds is the same for every dropout."""

    def added(dropout):
        asked = replace(config(), lora=LoraConfig(rank=4, dropout=dropout))
        validated = replace(asked, data=replace(asked.data, val_path="validation"))
        return estimate_memory(validated).tensors - estimate_memory(asked).tensors

    assert added(0.5) == added(0.0) > 0


def test_the_portable_form_is_planned_too():
    found = {}
    for form in ("portable", "cpu"):
        with forms.forced(form):
            found[form] = estimate_memory(config())
    kept = found["portable"].activations
    assert kept == pytest.approx(found["cpu"].activations, rel=0.1)
    # Of tokens by tokens there is one layer's alone, and only while it is worked on.
    with forms.forced("portable"):
        shorter = replace(config(), data=DataConfig(context_length=16))
        assert kept <= 2.02 * estimate_memory(shorter).activations
    assert found["portable"].gradients == found["cpu"].gradients


def test_the_largest_micro_batch_is_a_divisor_that_fits(monkeypatch):
    # A whole batch of 12 needs no sums of gradients, so here it takes less than two halves.
    totals = {1: 130, 2: 140, 3: 150, 4: 160, 6: 180, 12: 170}

    def estimate(asked, *, copies):
        assert not copies  # which are worth no smaller micro-batch
        return SimpleNamespace(total=totals[asked.training.micro_batch] * mb)

    asked, mb = config(batch_size=12), 10**6
    monkeypatch.setattr("tinyllama.train.micro_batch.estimate_memory", estimate)
    found = {limit: largest_micro_batch(asked, limit * mb) for limit in range(125, 185)}
    assert [found[n] for n in (129, 130, 139, 140, 149, 150, 160, 169)] == [
        None, 1, 1, 2, 2, 3, 4, 4,
    ]  # fmt: skip
    assert {found[n] for n in range(170, 185)} == {12}
    totals[12] = 1000
    assert largest_micro_batch(asked, 185 * mb) == 6


def test_a_smaller_micro_batch_takes_less(same_runtime):
    one, two = (estimate_memory(config(SMALL, batch_size=4, micro_batch_size=n)) for n in (1, 2))
    assert one.total < two.total


def test_a_run_that_cannot_fit_is_refused(monkeypatch, same_runtime):
    asked = config(batch_size=1)
    total = estimate_memory(asked).total
    monkeypatch.setattr(memory, "free_bytes", lambda: total)
    assert plan_run(asked).report.endswith(
        f"fits: {total / 1e9:.2f} GB of {total / 1e9:.2f} GB free"
    )
    monkeypatch.setattr(memory, "free_bytes", lambda: 100_000_000)
    with pytest.raises(ConfigError) as refused:
        plan_run(asked)
    needs = f"does not fit: needs {total / 1e9:.2f} GB, and CPU has 0.10 GB free; "
    assert f"{needs}not even a micro-batch of 1 does" in str(refused.value)
    assert str(refused.value).splitlines()[-1].endswith("or try it nevertheless with --force")
    assert plan_run(asked, force=True).report.endswith("not even a micro-batch of 1 does")
    monkeypatch.setattr(memory, "free_bytes", lambda: None)
    assert plan_run(asked).report.endswith("the memory of CPU is not known")


def test_a_micro_batch_that_fits_is_chosen_where_none_is_set(monkeypatch, same_runtime):
    asked = config(SMALL, batch_size=64)
    sizes = [replace(asked.training, micro_batch_size=n) for n in (64, 16, 32)]
    whole, few, half = (estimate_memory(replace(asked, training=t)).total for t in sizes)
    assert few < half < whole
    monkeypatch.setattr(memory, "free_bytes", lambda: half - 1)
    found = plan_run(asked)
    assert (found.config.training, found.step.micro_batches) == (sizes[1], 4)
    assert found.report.endswith("free; training.micro_batch_size is not set: 16 of 64 at a time")
    monkeypatch.setattr(memory, "free_bytes", lambda: whole)
    assert plan_run(asked).config == asked
    # One that is set is not changed.
    monkeypatch.setattr(memory, "free_bytes", lambda: half - 1)
    with pytest.raises(ConfigError, match="the largest micro-batch that does is 16"):
        plan_run(replace(asked, training=sizes[2]))


@pytest.mark.parametrize(
    ("section", "sizes", "message"),
    [
        ("model", {"num_layers": 10**16}, r"^does not fit: the model has [\d,]{20,} parameters"),
        ("model", {"hidden_size": 64 * 10**13}, "^does not fit: the model has "),
        (
            "training",
            {"batch_size": 10**9},
            r"^training\.batch_size: 1000000000 x 32 tokens do not",
        ),
        (
            "training",
            {"batch_size": 5 * 10**7, "micro_batch_size": 5 * 10**7},
            r"^training\.micro_batch_size: 50000000 x 32 tokens do not fit: CPU has 20\.00 GB free",
        ),
    ],
)
def test_what_never_fits_is_refused_without_planning(monkeypatch, section, sizes, message):
    monkeypatch.setattr("tinyllama.train.micro_batch.blank_step", lambda _: pytest.fail("planned"))
    monkeypatch.setattr(memory, "free_bytes", lambda: 20 * 10**9)
    asked = config(batch_size=1)
    changed = replace(asked, **{section: replace(getattr(asked, section), **sizes)})
    with pytest.raises(ConfigError, match=message):
        plan_run(changed)


def test_only_parts_that_may_fit_are_planned(monkeypatch, same_runtime):
    """A batch far larger than the memory would take long to plan as a whole."""
    asked, planned = config(SMALL, batch_size=2**15), []
    limit = estimate_memory(config(SMALL, batch_size=2**15, micro_batch_size=8)).total

    def noted(asked, step=None, **copies):
        planned.append(asked.training.micro_batch)
        return estimate_memory(asked, step, **copies)

    monkeypatch.setattr("tinyllama.train.micro_batch.estimate_memory", noted)
    monkeypatch.setattr(memory, "free_bytes", lambda: limit)
    assert plan_run(asked).config.training.micro_batch_size == 8
    width = 2 * asked.context_length * asked.model.hidden_size
    assert max(planned) * width <= limit < 2**15 * width


def test_the_verdict_names_the_largest_micro_batch(monkeypatch):
    monkeypatch.setattr("tinyllama.train.micro_batch.largest_micro_batch", lambda *_: 4)
    found, most = SimpleNamespace(total=3 * 10**9), "the largest micro-batch that does is 4"
    assert verdict(config(), found, 3 * 10**9) == f"fits the 3.00 GB that CPU has free; {most}"
    assert verdict(config(), found, 3 * 10**9 - 1) == (
        f"does not fit: needs 3.00 GB, and CPU has 3.00 GB free; {most}"
    )


def test_train_prints_the_estimate_and_refuses_unless_forced(tmp_path, monkeypatch, capsys):
    def reached(*_, **__):
        raise TrainingError("training was reached")

    monkeypatch.setattr("tinyllama.train.trainer.Trainer", reached)
    monkeypatch.setattr(memory, "free_bytes", lambda: 1_000_000)
    (tmp_path / "run.toml").write_text(config(batch_size=1).to_toml())
    words = ["train", str(tmp_path / "run.toml"), "--set"]
    words.append(f"checkpointing.checkpoint_dir={tmp_path / 'run'}")
    (tmp_path / "train.txt").write_text("not read")
    words += ["--set", f"data.train_path={tmp_path / 'train.txt'}"]
    for extra, expected in (([], "does not fit"), (["--force"], "training was reached")):
        with pytest.raises(SystemExit) as stopped:
            app.main([*words, *extra])
        assert stopped.value.code == 2
        captured_text = capsys.readouterr()
        assert expected in captured_text.err
        assert ("does not fit" in captured_text.out) == bool(extra)


def test_the_tool_prints_a_table_and_a_verdict(tmp_path, capsys, same_runtime):
    (tmp_path / "run.toml").write_text(config().to_toml())
    words = (str(tmp_path / "run.toml"), "--batch", "1", "--context", "16", "--dtype", "bfloat16")
    code, out, _ = tool("memory", *words, "--device-memory", "5e8", capsys=capsys)
    assert code == 0
    assert out.splitlines()[0].split() == ["memory", "bytes"]
    assert out.splitlines()[-1] == (
        "fits the 0.50 GB that CPU has free; the largest micro-batch that does is 1"
    )
    _, out, _ = tool("memory", *words, "--device-memory", "1e6", "--json", capsys=capsys)
    found = json.loads(out)
    asked = config(batch_size=1, dtype="bfloat16")
    asked = replace(asked, data=replace(asked.data, context_length=16))
    expected = estimate_memory(asked).as_dict()
    assert {key: found[key] for key in expected} == expected
    assert (found["device"], found["device_memory"]) == ("CPU", 1_000_000)
    assert (found["fits"], found["largest_micro_batch"]) == (False, None)


def test_the_tool_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "run.toml").write_text(config().to_toml())
    code, _, err = tool("memory", str(tmp_path / "run.toml"), "--dtype", "int3", capsys=capsys)
    assert code == 2
    assert err.startswith('memory: --set training.dtype="int3": got "int3", must be "float32"')


def test_free_memory_is_what_the_system_or_a_container_leaves(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    2000 kB\n")
    groups = tmp_path / "groups"
    assert memory.free_bytes(tmp_path, groups) == 2_048_000
    (groups / "memory").mkdir(parents=True)
    (groups / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (groups / "memory" / "memory.usage_in_bytes").write_text("500\n")
    assert memory.free_bytes(tmp_path, groups) == 2_048_000
    (groups / "memory" / "memory.limit_in_bytes").write_text("3000\n")
    (groups / "memory" / "memory.stat").write_text("cache 1\ntotal_cache 100\n")
    assert memory.free_bytes(tmp_path, groups) == 2_600
    (groups / "memory.max").write_text("max\n")
    (groups / "memory.current").write_text("10\n")
    assert memory.free_bytes(tmp_path, groups) == 2_600
    (groups / "memory.max").write_text("1000\n")
    (groups / "memory.stat").write_text("anon 3\nfile 5\n")
    assert memory.free_bytes(tmp_path, groups) == 995


def test_the_least_of_nested_control_groups_counts(tmp_path):
    def group(folder, limit, used, version=2):
        names = ("memory.max", "memory.current")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        folder.mkdir(parents=True, exist_ok=True)
        for name, number in zip(names, (limit, used), strict=True):
            (folder / name).write_text(f"{number}\n")

    groups, outside = tmp_path / "groups", tmp_path
    (tmp_path / "meminfo").write_text("MemAvailable:    2000 kB\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("4:cpu,memory:/old/inner\n0::/pod/job/step\n")
    group(outside, 1, 0)  # above the root: not a control group
    group(groups / "pod", "max", 9_000)
    group(groups / "pod" / "job", 9_000, 4_000)
    group(groups / "pod" / "job" / "step", 8_000, 10)
    group(groups / "other", 7, 0)
    assert memory.free_bytes(tmp_path, groups) == 5_000
    (groups / "pod" / "job" / "memory.stat").write_text("file 300\n")
    assert memory.free_bytes(tmp_path, groups) == 5_300
    group(groups / "memory" / "old", 4_000, 1_000, version=1)
    group(groups / "memory" / "old" / "inner", 2**63 - 4096, 900, version=1)
    assert memory.free_bytes(tmp_path, groups) == 3_000


def test_free_memory_without_linux_is_the_machines():
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory.free_bytes(Path("/nowhere"), Path("/nowhere")) == pages


def test_rotary_tables_outlive_the_step_that_made_them():
    model = build(SQUARE)
    step = TrainStep(model, AdamW(model.state_dict(), TrainingConfig()), 1)
    batch = random_batch(SQUARE, rows=2, length=32)
    result = step([batch], 1, 0.0)
    cos, _ = model.rotations(32)
    assert np.allclose(cos.numpy()[:, 0], np.cos(np.arange(32)), atol=1e-6)
    after = captured(StagedLoss(model).loss)(*on_device(batch)).item()
    assert after / result.tokens == pytest.approx(result.loss, rel=1e-6)


def test_a_step_learns_the_same_from_a_head_in_several_chunks(monkeypatch):
    results = {}
    for chunks in (1, 2, 4):
        elements = 4 * 64 * SQUARE.vocab_size // chunks
        monkeypatch.setattr("tinyllama.ops.cross_entropy.CHUNK_ELEMENTS", elements)
        model = build(SQUARE)
        step = TrainStep(model, AdamW(model.state_dict(), TrainingConfig()), 1)
        batch = random_batch(SQUARE, rows=4, length=64)
        found = [step([batch], number, 1e-2) for number in (1, 2, 3)]
        results[chunks] = [(result.loss, result.grad_norm) for result in found]
    assert np.allclose(results[2], results[1], rtol=1e-4)
    assert np.allclose(results[4], results[1], rtol=1e-4)
