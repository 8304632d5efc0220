"""Faults of the commands that write a model or a cache: merge, export, tokenizing.

Each function makes one try, and returns how many faults were really made.
"""

import contextlib
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from lab import Ended, Failure, Fault, Lab, contents, spread
from runs import ENDS, damage, is_early

# What a command writes depends on nothing else, so that it is the same each time.
_FREE = {"digests.json"}  # dates and inodes of the texts


@dataclass
class Writing:
    """A command that writes into the folder `out` of a try, and what it writes if it may."""

    words: list[str]
    target: str  # below `out`: there once the command is done
    calls: int = 0
    written: dict[str, str] | None = None
    seconds: float = 0.0


KINDS = ("folder", "gguf", "mlx", "merge", "tokens")
_writings: dict[tuple[Lab, str], Writing] = {}


def writing(lab: Lab, kind: str) -> Writing:
    """A command, run once without a fault."""
    if (lab, kind) in _writings:
        return _writings[lab, kind]
    folder = lab.tried
    out, model, adapter = folder / "out", folder / "run/final", folder / "lora/final"
    tokens = [str(folder / "text.txt"), str(model / "tokenizer.model"), str(out)]
    made = {
        "folder": Writing(["export", str(model), str(out / "hf"), "--dtype", "bf16"], "hf"),
        "gguf": Writing(["export", str(model), str(out / "m.gguf")], "m.gguf"),
        "mlx": Writing(["export", str(adapter), str(out / "mlx"), "--to", "mlx"], "mlx"),
        "merge": Writing(
            ["merge", "--base", str(model), "--adapter", str(adapter), "--out", str(out / "one")],
            "one",
        ),
        "tokens": Writing(["tokenize", *tokens], ""),
    }[kind]
    begin(lab)
    begun = time.monotonic()
    ended = lab.command(*made.words)
    assert ended.code == 0, ended.err
    made.calls, made.written, made.seconds = ended.calls, kept(lab), time.monotonic() - begun
    _writings[lab, kind] = made
    return made


def begin(lab: Lab) -> None:
    """A folder with a model, an adapter of it, and a place to write to."""
    lab.anew("adapted")
    (lab.tried / "out").mkdir()


def kept(lab: Lab) -> dict[str, str]:
    """What is in the place to write to."""
    there = contents(lab.tried / "out")
    return {name: digest for name, digest in there.items() if Path(name).name not in _FREE}


def completed(lab: Lab, made: Writing, sources: dict[str, str]) -> None:
    """What is there under its name is whole; the command, once more, does what it would have
    done; what it read is as it was."""
    assert made.written is not None
    there = {n: d for n, d in kept(lab).items() if not n.startswith(".")}
    if wrong := [name for name, digest in there.items() if made.written.get(name) != digest]:
        raise Failure(f"under their names, and not whole: {wrong}")
    if not made.target or not os.path.lexists(lab.tried / "out" / made.target):
        lab.ends_well(lab.command(*made.words), [0])
    if kept(lab) != made.written:
        raise Failure(f"is there: {sorted(kept(lab))}, not {sorted(made.written)}")
    if _sources(lab) != sources:
        raise Failure("what was read has changed")


def _sources(lab: Lab) -> dict[str, str]:
    return contents(lab.tried / "run") | contents(lab.tried / "lora")


def _dies(lab: Lab, kind: str, number: int) -> int:
    made = writing(lab, kind)
    begin(lab)
    sources = _sources(lab)
    ended = lab.command(*made.words, fault=Fault(at_call=spread(number, made.calls)))
    lab.ends_well(ended, [0, -signal.SIGKILL])
    completed(lab, made, sources)
    return int(ended.code != 0)


def dies_in_an_export(lab: Lab, seed: int) -> int:
    """SIGKILL at a file call of an export (Hugging Face, GGUF, MLX): every one in turn."""
    return _dies(lab, ("folder", "gguf", "mlx")[seed % 3], seed // 3)


def dies_in_a_merge(lab: Lab, seed: int) -> int:
    """SIGKILL at a file call of a merge: every one in turn."""
    return _dies(lab, "merge", seed)


def dies_in_tokenizing(lab: Lab, seed: int) -> int:
    """SIGKILL at a file call while tokens are written: every one in turn."""
    return _dies(lab, "tokens", seed)


def signalled_at_a_call_in_writing(lab: Lab, seed: int) -> int:
    """SIGTERM, SIGINT, or SIGSTOP and SIGCONT, at a file call of a merge, an export, of tokens."""
    number = (signal.SIGTERM, signal.SIGINT, signal.SIGSTOP)[seed % 3]
    made = writing(lab, KINDS[seed // 3 % len(KINDS)])
    begin(lab)
    sources = _sources(lab)
    fault = Fault(at_call=spread(seed // (3 * len(KINDS)), made.calls), signal=number)
    ended = lab.command(*made.words, fault=fault)
    if not is_early(ended):
        lab.ends_well(ended, [0, *ENDS[number]])
    completed(lab, made, sources)
    return int(ended.code != 0 or ended.stops > 0 or ended.calls >= fault.at_call)


def calls_fail_in_writing(lab: Lab, seed: int) -> int:
    """File calls that fail at random in a merge, an export, or while tokens are written."""
    chance = random.Random(seed)
    made = writing(lab, chance.choice(KINDS))
    begin(lab)
    sources = _sources(lab)
    rate = chance.choice([0.5, 1, 2, 5, 20]) / made.calls
    ended = lab.command(*made.words, fault=Fault(seed, rate))
    lab.ends_well(ended, [0, 2])
    _once_more(lab, made, ended)
    completed(lab, made, sources)
    return ended.faults


def _once_more(lab: Lab, made: Writing, ended: Ended) -> None:
    """A part that could not be removed either stays until the next command there."""
    if ended.code and made.target and os.path.lexists(lab.tried / "out" / made.target):
        raise Failure(f"exit code 2, and the result is there: {ended.err}")


def signalled_in_writing(lab: Lab, seed: int) -> int:
    """SIGKILL, SIGTERM, SIGINT, or SIGSTOP and SIGCONT, at a random moment of such a command."""
    chance = random.Random(seed)
    made = writing(lab, chance.choice(KINDS))
    begin(lab)
    sources, sent = _sources(lab), 0
    number = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP])

    def send(process: int) -> None:
        nonlocal sent
        time.sleep(chance.uniform(0, made.seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
            sent = 1
            if number == signal.SIGSTOP:
                time.sleep(0.05)
                os.kill(process, signal.SIGCONT)

    ended = lab.command(*made.words, meanwhile=send)
    if not is_early(ended):
        lab.ends_well(ended, [0, *ENDS[number]])
    completed(lab, made, sources)
    return sent


def bits_flip_in_models(lab: Lab, seed: int) -> int:
    """A flipped bit in a base or an adapter that is merged, exported, evaluated or trained on."""
    chance = random.Random(seed)
    begin(lab)
    folder = lab.tried
    base = chance.random() < 0.5
    files = (
        ["model.safetensors", "config.json", "manifest.json"]
        if base
        else ["adapter_model.safetensors", "adapter_config.json", "manifest.json"]
    )
    damaged = folder / ("run" if base else "lora") / "final" / chance.choice(files)
    damage(damaged, chance)
    data = ["--data", str(folder / "text.txt"), "--cache-dir", str(folder / "cache")]
    adapter, model, out = str(folder / "lora/final"), str(folder / "run/final"), folder / "out"
    words = chance.choice(
        [
            ["evaluate", "--model", adapter, *data],
            ["generate", "--model", adapter, "--max-new-tokens", "2"],
            ["merge", "--base", model, "--adapter", adapter, "--out", str(out / "one")],
            ["export", adapter, str(out / "m"), "--merged"],
        ]
    )
    ended = lab.command(*words)
    lab.ends_well(ended, [2])
    if ended.out or kept(lab):
        raise Failure(f"{damaged.name}: a result of {words[0]}: {ended.out} {list(kept(lab))}")
    return 1


def bits_flip_in_files_without_sums(lab: Lab, seed: int) -> int:
    """A flipped bit in a GGUF file or an exported folder, which hold no sums: never a traceback."""
    chance = random.Random(seed)
    made = writing(lab, chance.choice(["gguf", "folder"]))
    begin(lab)
    lab.ends_well(lab.command(*made.words), [0])
    target = lab.tried / "out" / made.target
    files = [target] if target.is_file() else sorted(p for p in target.iterdir() if p.is_file())
    damage(chance.choice(files), chance)
    ended = lab.command("generate", "--model", str(target), "--max-new-tokens", "2")
    lab.ends_well(ended, [0, 2])
    return 1
