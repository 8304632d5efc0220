"""Random sequences of what users and accidents do to a run and to a cache of tokens (hypothesis).

A run is trained, killed or stopped at some file call, continued with other options, damaged, taken
back to an older checkpoint, in any order; a cache meets other texts, damage and what killed
processes left.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "chaos"))

import targets
from lab import STEPS, Fault, Lab, losses, newest
from parsers import Judge

from tinyllama.data import corpus
from tinyllama.train.checkpoint import list_checkpoints, looks_whole, read_state

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
OPTIONS = st.sampled_from(
    [
        [],
        ["--set", "checkpointing.save_every=1"],
        ["--set", "checkpointing.keep_last_n=1"],
        ["--set", "checkpointing.keep_last_n=5", "--set", "checkpointing.save_every=3"],
    ]
)


class Runs(RuleBasedStateMachine):
    """A run in a folder, and what may be counted on: the newest step that was saved."""

    lab: Lab

    @initialize()
    def begin(self) -> None:
        self.lab.anew()
        self.saved, self.is_done, self.damages = 0, False, 0

    def _train(self, *words: str, fault: Fault | None = None) -> int:
        ended = self.lab.train(*words, fault=fault)
        self.lab.ends_well(ended, [0, 2, -signal.SIGKILL, 143, -signal.SIGTERM])
        assert ended.code != 2, ended.err
        self.saved = max([self.saved, *ended.saved])
        self.is_done = ended.code == 0
        return ended.code

    def _how(self) -> list[str]:
        return ["--resume"] if list_checkpoints(self.lab.run) else []

    @rule(share=st.floats(0, 1), options=OPTIONS)
    def train_until_killed(self, share: float, options: list[str]) -> None:
        """At some file call; perhaps the run is done before."""
        fault = Fault(at_call=1 + int(share * self.lab.calls))
        self._train(*self._how(), *options, fault=fault)

    @rule(share=st.floats(0, 1), options=OPTIONS)
    def train_until_stopped(self, share: float, options: list[str]) -> None:
        """By SIGTERM at some file call: it saves and leaves."""
        at = 1 + int(share * self.lab.calls)
        self._train(*self._how(), *options, fault=Fault(at_call=at, signal=signal.SIGTERM))

    @rule(options=OPTIONS)
    def train_to_the_end(self, options: list[str]) -> None:
        assert self._train(*self._how(), *options) == 0
        assert newest(self.lab.run) == STEPS
        assert losses(self.lab.run) == self.lab.reference

    @precondition(lambda self: len(self._whole()) > 1 and self.damages < 2)
    @rule(bit=st.integers(0, 1 << 20))
    def damage_the_newest(self, bit: int) -> None:
        """What is counted on is then the newest of the others."""
        file = self._whole()[-1] / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[bit // 8 % len(data)] ^= 1 << bit % 8
        file.write_bytes(data)
        self.damages += 1
        self.saved, self.is_done = newest(self.lab.run), False

    @precondition(lambda self: len(self._whole()) > 0)
    @rule(number=st.integers(0, 9))
    def go_back(self, number: int) -> None:
        """To any whole checkpoint; the later ones are set aside, and made again."""
        whole = self._whole()
        chosen = whole[number % len(whole)]
        self.saved = read_state(chosen)["step"]
        assert self._train("--resume", str(chosen)) == 0
        assert newest(self.lab.run) == STEPS

    def _whole(self) -> list[Path]:
        return [p for p in list_checkpoints(self.lab.run) if looks_whole(p) and self._holds(p)]

    @staticmethod
    def _holds(folder: Path) -> bool:
        from tinyllama.errors import CheckpointError
        from tinyllama.train.checkpoint import verify

        try:
            verify(folder)
        except CheckpointError:
            return False
        return True

    @invariant()
    def nothing_is_lost(self) -> None:
        assert newest(self.lab.run) >= self.saved

    @invariant()
    def every_loss_is_that_of_a_run_that_was_never_stopped(self) -> None:
        if (self.lab.run / "metrics.jsonl").exists():
            for step, loss in losses(self.lab.run).items():
                assert loss == self.lab.reference[step]


class Tokens(RuleBasedStateMachine):
    """A text and a cache of its tokens; the tokens are those of the text, whatever happened."""

    @initialize()
    def begin(self) -> None:
        self.folder = targets.new_folder()
        self.text = self.folder / "text.txt"
        self.cache = self.folder / "cache"
        self.write("a text")

    @rule(text=st.text(min_size=1, max_size=60))
    def write(self, text: str) -> None:
        self.text.write_bytes(text.encode())

    @rule()
    def prepare(self) -> None:
        held = targets.tokenizer()
        found = corpus.prepare(str(self.text), held, self.cache, workers=1, progress=False)
        text = self.text.read_bytes().decode().removeprefix("\ufeff")
        assert found.tokens.tolist() == [held.bos_id, *held.encode(text), held.eos_id]
        assert found.starts.tolist() == [0]

    def _files(self) -> list[Path]:
        return sorted(p for p in self.cache.rglob("*") if p.is_file() and p.stat().st_size)

    @precondition(lambda self: self.cache.exists() and self._files())
    @rule(number=st.integers(0, 50), bit=st.integers(0, 1 << 12))
    def flip_a_bit(self, number: int, bit: int) -> None:
        file = self._files()[number % len(self._files())]
        data = bytearray(file.read_bytes())
        data[bit // 8 % len(data)] ^= 1 << bit % 8
        file.write_bytes(data)

    @precondition(lambda self: self.cache.exists() and self._files())
    @rule(number=st.integers(0, 50), size=st.integers(0, 40))
    def cut_or_remove(self, number: int, size: int) -> None:
        file = self._files()[number % len(self._files())]
        if size:
            os.truncate(file, min(size, file.stat().st_size - 1))
        else:
            file.unlink()

    @precondition(lambda self: self.cache.exists())
    @rule(ids=st.lists(st.integers(0, 65535), min_size=1, max_size=30))
    def plant_tokens(self, ids: list[int]) -> None:
        """Of a stranger, under the right name, without the right sum."""
        for folder in self.cache.iterdir():
            if folder.is_dir() and (folder / "tokens.bin").exists():
                (folder / "tokens.bin").write_bytes(np.array(ids, np.uint16).tobytes())

    @precondition(lambda self: self.cache.exists())
    @rule()
    def leave_a_half_written_one(self) -> None:
        for folder in list(self.cache.iterdir()):
            if folder.is_dir() and not folder.name.startswith("."):
                left = folder.with_name(f".{folder.name}.partial-1-00000000-0-00000000")
                shutil.copytree(folder, left, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if os.name != "posix" or shutil.which("clang") is None or not os.path.exists("/proc/self/fd"):
        pytest.skip("needs Linux and clang")
    made = Lab(tmp_path_factory.mktemp("states").resolve())
    yield made
    made.close()


def test_no_sequence_loses_a_checkpoint_or_changes_a_loss(lab: Lab) -> None:
    Runs.lab = lab
    examples = int(os.environ.get("STATES_EXAMPLES", "2"))
    limits = settings(
        max_examples=examples, stateful_step_count=5, deadline=None, derandomize=examples < 10,
        suppress_health_check=QUIET, database=None,
    )  # fmt: skip
    run_state_machine_as_test(Runs, settings=limits)


def test_tokens_are_always_those_of_the_text() -> None:
    limits = settings(
        max_examples=20, stateful_step_count=12, deadline=None, suppress_health_check=QUIET,
        database=None,
    )  # fmt: skip
    run_state_machine_as_test(Tokens, settings=limits)


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "rank_pattern", "bias",
     "alpha_pattern", "modules_to_save", "layers_to_transform", "layers_pattern", "peft_type",
     "fan_in_fan_out", "exclude_modules", "base_model_name_or_path", "use_dora", "revision"]
)  # fmt: skip


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge("adapter_config")


@given(entries=st.dictionaries(KEYS | st.text(max_size=20), VALUES, max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=QUIET, database=None)
def test_any_values_in_an_adapters_configuration_are_refused_or_read(
    judge: Judge, entries: dict[str, Any]
) -> None:
    seed = json.loads(targets.seeds("adapter_config")[0])
    assert judge.problem(json.dumps(seed | entries).encode()) is None
