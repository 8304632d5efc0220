"""The protocol of saving: verified as a model by spin, which the real code is held to.

checkpoint.pml is explored in every order of operations, crashes and failing deletions: no state
loses the last whole checkpoint. Then spin prints random runs of the model, and the real functions
are made to do the same in a process each, which is killed where the model's run crashes. After
every call the folder holds what the model's state says.
"""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

from tinyllama.system import partials
from tinyllama.train import checkpoint

MODEL = Path(__file__).with_name("checkpoint.pml")
needs_spin = pytest.mark.skipif(shutil.which("spin") is None, reason="spin is not installed")
pytestmark = needs_spin
SEEDS = 20  # of runs that are replayed
EXCHANGE = pytest.mark.parametrize("exchange", [1, 0], ids=["exchange", "two renames"])


def verified(text: str, folder: Path, *defines: str) -> tuple[int, int]:
    """Errors and states of a model that spin explores whole."""
    (folder / "model.pml").write_text(text)
    spin = ["spin", "-a", *(f"-D{define}" for define in defines), "model.pml"]
    compiler = ["clang", "-O2", "-w", "-DSAFETY", "-DCOLLAPSE", "-o", "pan", "pan.c"]
    for command in (spin, compiler):
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    explored = subprocess.run(["./pan", "-m1000000"], cwd=folder, capture_output=True, text=True)
    found = re.search(r"errors: (\d+)\s+(\d+) states, stored", explored.stdout)
    assert found, explored.stdout
    assert found[1] != "0" or "not completed" not in explored.stdout
    return int(found[1]), int(found[2])


@EXCHANGE
def test_no_state_loses_the_last_whole_checkpoint(tmp_path: Path, exchange: int) -> None:
    errors, states = verified(MODEL.read_text(), tmp_path, f"EXCHANGE={exchange}")
    assert errors == 0
    assert states > 100_000


BROKEN = {
    "the old checkpoint is deleted before the new one is filled": (
        1,
        "recover();\n  atomic { fresh = version; version++; partials++; SAY(op_begin) }\n  if",
        "recover(); discard(final);\n  atomic { fresh = version; version++; partials++ }\n  if",
    ),
    "a save returns before the new checkpoint has its name": (
        1,
        "atomic { partials--; next = fresh; SAY(op_rename) }",
        "announced = fresh; atomic { partials--; next = fresh; SAY(op_rename) }",
    ),
    "what was renamed aside is not completed after a crash": (
        0,
        ":: atomic { place != 0 && final == 0 -> final = place; place = 0; SAY(op_rename) }",
        ":: place != 0 && final == 0 -> discard(place)",
    ),
    "older steps are deleted before the new one has its name": (
        1,
        "atomic { partials--; steps[at] = fresh; SAY(op_rename) }\n  other = 0;",
        "other = 0;",
    ),
    "going back deletes": (1, "aside[other] = steps[other]; ", ""),
    "a second run is not refused": (1, ":: held -> goto ended", ":: held -> skip"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_protocol_is_found(tmp_path: Path, fault: str) -> None:
    exchange, right, wrong = BROKEN[fault]
    text = MODEL.read_text()
    assert right in text
    errors, _ = verified(text.replace(right, wrong), tmp_path, f"EXCHANGE={exchange}", "CRASHES=1")
    assert errors > 0


# ---- the real code does what the model does


class Call(NamedTuple):
    """A call of the model's run: its words, the operations it did, the state after it."""

    words: tuple[str, ...]
    operations: tuple[str, ...]
    state: dict[str, str]
    crashed: bool


def calls_of(seed: int, exchange: int, folder: Path) -> list[Call]:
    """A random run of the model; spin writes files of fixed names into the folder."""
    defines = [f"-DEXCHANGE={exchange}", "-DSAVES=30", "-DCRASHES=6", "-DREPLAY"]
    command = ["spin", f"-n{seed}", "-u3000", "-T", "-B", *defines, str(MODEL)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    printed = done.stdout
    calls: list[Call] = []
    state = {"final": "0", "next": "0", "old": "0", "steps": "0,0", "partials": "0"}
    for line in printed.splitlines():
        words = tuple(line.split())
        if words and words[0] in ("recover", "save", "back"):
            calls.append(Call(words, (), state, False))
        elif words and words[0].startswith("op_"):
            state = dict(word.split("=") for word in words[1:])
            operations = (*calls[-1].operations, words[0].removeprefix("op_"))
            calls[-1] = calls[-1]._replace(operations=operations, state=state)
        elif words == ("crash",) and calls:
            calls[-1] = calls[-1]._replace(crashed=True)
    return calls


def numbers(root: Path) -> dict[str, str]:
    """What a folder holds, as the model's state."""

    def version(name: str) -> str:
        file = root / name / "version"
        return file.read_text() if file.is_file() else "0"

    steps = ",".join(version(checkpoint.step_name(i)) for i in (1, 2))
    hidden = len([*root.glob(".*.partial-*")])
    names = {"final": "final", "next": ".final.next", "old": ".final.old"}
    held = {key: version(name) for key, name in names.items()}
    return {**held, "steps": steps, "partials": str(hidden)}


class Steps:
    """Lets the real code do the model's operations; ends the process where the model crashes."""

    def __init__(self, call: Call, exchange: int) -> None:
        self.left, self.crashes, self.exchange = [*call.operations], call.crashed, exchange
        self.rename, self.mkdir, self.rmtree = os.rename, Path.mkdir, shutil.rmtree
        self.swap = checkpoint._exchange

    def __enter__(self) -> "Steps":
        os.rename = self._rename  # type: ignore[assignment]
        Path.mkdir = self._mkdir  # type: ignore[assignment, method-assign]
        shutil.rmtree = self._rmtree  # type: ignore[assignment]
        checkpoint._exchange = self._exchange
        return self

    def __exit__(self, *error: object) -> None:
        pass  # of a process that ends now

    def next(self, operation: str) -> None:
        if self.left and self.left[0] == operation:
            self.left.pop(0)
        elif operation == "delete" and not (self.crashes and not self.left):
            raise OSError(errno.EPERM, "the model's deletion failed")
        elif self.crashes and not self.left:
            os._exit(9)
        else:
            print(f"{operation} instead of {self.left}", file=sys.stderr)
            os._exit(3)

    def _rename(self, old: Path, new: Path) -> None:
        aside, hidden = ".aside-" in str(new), ".partial-" in str(new)
        self.next("aside" if aside else "discard" if hidden else "rename")
        self.rename(old, new)

    def _mkdir(self, path: Path, *arguments: object, **options: object) -> None:
        if ".partial-" in path.name:
            self.next("begin")
        self.mkdir(path, *arguments, **options)  # type: ignore[arg-type]

    def _rmtree(self, path: Path, **options: object) -> None:
        self.next("delete")
        self.rmtree(path, **options)  # type: ignore[call-overload]

    def _exchange(self, first: Path, second: Path) -> bool:
        if not self.exchange:
            return False
        self.next("exchange")
        return self.swap(first, second)


def real(root: Path, call: Call) -> None:
    """The product's own function for a call of the model."""
    kind, *rest = call.words
    if kind == "recover":
        checkpoint.recover(root)
    elif kind == "back":
        checkpoint.set_aside(root, int(rest[0]))
    else:
        name = "final" if rest[0] == "final" else checkpoint.step_name(int(rest[2]) + 1)
        step = 0 if rest[0] == "final" else int(rest[2]) + 1

        def write(folder: Path) -> None:
            (folder / "version").write_text(rest[1])
            (folder / "training_state.json").write_text(json.dumps({"step": step}))

        keep = None if rest[0] == "final" else 1
        checkpoint.save_checkpoint(root, name, write, keep)


def in_a_process(function: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(4)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def replayed(folder: Path, exchange: int, seeds: Iterable[int]) -> tuple[Counter[str], int]:
    """Replay runs of the model: how often the real code was called for each of the model's words,
    and how often it was killed. Whatever has a checkpoint's name is whole at every moment."""
    done: Counter[str] = Counter()
    crashes = 0
    for seed in seeds:
        root = folder / str(seed)
        root.mkdir()
        for number, call in enumerate(calls_of(seed, exchange, folder)):

            def replay(call: Call = call, root: Path = root) -> None:
                with Steps(call, exchange) as steps:
                    real(root, call)
                    assert not steps.left, f"not done: {steps.left}"

            code = in_a_process(replay)
            assert code in ((0, 9) if call.crashed else (0,)), (seed, number, call)
            assert numbers(root) == call.state, (seed, number, call)
            for checkpoint_folder in checkpoint.list_checkpoints(root):
                checkpoint.verify(checkpoint_folder)
            done[" ".join(call.words[:2] if call.words[0] == "save" else call.words[:1])] += 1
            crashes += call.crashed
    return done, crashes


@EXCHANGE
def test_the_real_code_does_what_the_model_does(tmp_path: Path, exchange: int) -> None:
    partials._boot()  # as a process that saves has it
    done, crashes = replayed(tmp_path, exchange, range(SEEDS))
    # Enough of the model was seen: resuming, both ways of saving, going back, dying.
    assert done.keys() == {"recover", "save final", "save step", "back"}
    assert min(done.values()) > SEEDS and crashes > SEEDS


def replaces_by_deleting(final: Path, new: Path) -> None:
    """`_replace`, which deletes the old checkpoint before the new one has its name."""
    shutil.rmtree(final)
    os.rename(new, final)


def prunes_everything(saved: Path, keep_last_n: int | None) -> None:
    """`_prune`, which deletes also what was just saved."""
    for path in checkpoint.list_checkpoints(saved.parent):
        if path.name.startswith("step-"):
            checkpoint._discarded(path)


def sets_nothing_aside(root: Path, step: int) -> list[tuple[Path, Path]]:
    """`set_aside`, after which a run is mixed with what followed before."""
    return []


def recovers_nothing(root: Path) -> list[Path]:
    """`recover`, which leaves a checkpoint without a name after a crash."""
    return []


FAULTS: dict[str, Callable[..., object]] = {
    "_replace": replaces_by_deleting,
    "_prune": prunes_everything,
    "set_aside": sets_nothing_aside,
    "recover": recovers_nothing,
}


@pytest.mark.parametrize("name", FAULTS)
def test_real_code_that_does_something_else_is_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    partials._boot()
    monkeypatch.setattr(checkpoint, name, FAULTS[name])
    with pytest.raises(AssertionError):
        replayed(tmp_path, 1, range(SEEDS))
    capfd.readouterr()
