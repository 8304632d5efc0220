"""Faults of a run: signals, file calls that fail, a full disk, damaged files.

Each function makes one try, and returns how many faults were really made.
"""

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

from lab import STEPS, Ended, Failure, Fault, Lab, Skipped, grow, losses, mounted, newest, spread

# How a command may end after a signal.
ENDS: dict[int, list[int]] = {
    signal.SIGKILL: [-signal.SIGKILL],
    signal.SIGTERM: [143, -signal.SIGTERM],
    signal.SIGINT: [130, -signal.SIGINT],
    signal.SIGSTOP: [],
}


def is_early(ended: Ended) -> bool:
    """Python itself, before our handlers stand, shows its own traceback for SIGINT."""
    return ended.code in (-signal.SIGINT, 99) and not ended.saved


def killed(lab: Lab, seed: int) -> int:
    """SIGKILL at a random moment."""
    return _signalled(lab, seed, signal.SIGKILL)


def terminated(lab: Lab, seed: int) -> int:
    """SIGTERM or SIGINT at a random moment, perhaps twice."""
    chance = random.Random(seed)
    number = chance.choice([signal.SIGTERM, signal.SIGINT])
    return _signalled(lab, seed, number, chance.randint(1, 2))


def _signalled(lab: Lab, seed: int, number: signal.Signals, times: int = 1) -> int:
    chance = random.Random(seed)
    lab.anew()
    sent: list[int] = []

    def send(process: int) -> None:
        for _ in range(times):
            time.sleep(chance.uniform(0, lab.seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
                sent.append(number)

    ended = lab.train(meanwhile=send)
    if not is_early(ended):
        lab.ends_well(ended, [0, *ENDS[number]])
    if ended.code == 0:
        lab.holds()
    else:
        lab.continued(max(ended.saved, default=0))
    return len(sent)


def paused(lab: Lab, seed: int) -> int:
    """SIGSTOP and SIGCONT, five times, at random."""
    chance, made = random.Random(seed), 0
    lab.anew()

    def pause(process: int) -> None:
        nonlocal made
        for _ in range(5):
            time.sleep(chance.uniform(0, lab.seconds / 4))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
                time.sleep(chance.uniform(0, 0.05))
                os.kill(process, signal.SIGCONT)
                made += 1

    lab.ends_well(lab.train(meanwhile=pause), [0])
    lab.holds()
    return made


def dies_at_a_call(lab: Lab, seed: int) -> int:
    """SIGKILL at a file call of a run: every one in turn."""
    lab.anew()
    ended = lab.train(fault=Fault(at_call=spread(seed, lab.calls)))
    lab.ends_well(ended, [0, -signal.SIGKILL])
    if ended.code == 0:  # the number of calls differs a little from run to run
        lab.holds()
        return 0
    lab.continued(max(ended.saved, default=0))
    return 1


def dies_in_a_resume(lab: Lab, seed: int) -> int:
    """SIGKILL at a file call of a run that is resumed: every one in turn."""
    lab.anew("stopped")
    calls = max(1, lab.calls // 2)
    fault = Fault(at_call=spread(seed, calls))
    ended = lab.train("--resume", fault=fault)
    lab.ends_well(ended, [0, -signal.SIGKILL])
    lab.continued(max([4, *ended.saved]))
    return int(ended.code != 0)


def signalled_at_a_call(lab: Lab, seed: int) -> int:
    """SIGTERM, SIGINT, or SIGSTOP and SIGCONT, at a file call of a run, begun or resumed."""
    number = (signal.SIGTERM, signal.SIGINT, signal.SIGSTOP)[seed % 3]
    is_resumed = bool(seed // 3 % 2)
    lab.anew("stopped" if is_resumed else "fresh")
    calls = max(1, lab.calls // 2) if is_resumed else lab.calls
    fault = Fault(at_call=spread(seed // 6, calls), signal=number)
    ended = lab.train(*(["--resume"] if is_resumed else []), fault=fault)
    if not is_early(ended):
        lab.ends_well(ended, [0, *ENDS[number]])
    if ended.code == 0:
        lab.holds()
    else:
        lab.continued(max([4 if is_resumed else 0, *ended.saved]))
    return int(ended.code != 0 or ended.stops > 0 or ended.calls >= fault.at_call)


def calls_fail(lab: Lab, seed: int) -> int:
    """File calls that fail at random: no space, no permission, I/O errors, short writes."""
    chance = random.Random(seed)
    lab.anew("fresh" if chance.random() < 0.7 else "stopped")
    begun = (lab.run).exists()
    rate = chance.choice([0.5, 1, 2, 5, 20]) / lab.calls
    fault = Fault(seed, rate)
    ended = lab.train(*(["--resume"] if begun else []), fault=fault)
    lab.ends_well(ended, [0, 2])
    if ended.code == 0 and not any(w in ended.err for w in ("removed", "damaged")):
        if losses(lab.run) != lab.reference:
            raise Failure(f"other losses: {losses(lab.run)}")
    if ended.code != 0:
        lab.continued(max([4 if begun else 0, *ended.saved]))
    return ended.faults


def disk_fills(lab: Lab, seed: int) -> int:
    """A file system that fills, at another byte each time."""
    chance = random.Random(seed)
    lab.anew()
    lab.run.mkdir()
    size = chance.randrange(4 << 10, 3 << 20)
    with mounted(lab.run, size):
        ended = lab.train()
        lab.ends_well(ended, [0, 2])
        saved = max(ended.saved, default=0)
        if ended.code == 2 and "space" not in ended.err.lower():
            raise Failure(f"does not say that the disk is full: {ended.err}")
        if newest(lab.run) < saved:
            raise Failure(f"step {saved} was saved and is lost")
        grow(lab.run, "64m")
        if ended.code == 2:
            lab.continued(saved)
        else:
            lab.holds()
        return int(ended.code == 2)


def bits_flip(lab: Lab, seed: int) -> int:
    """A flipped bit, a cut or zeros in one file of any kind, before a run begins or is resumed."""
    chance = random.Random(seed)
    is_resumed = chance.random() < 0.7
    lab.anew("stopped" if is_resumed else "fresh")
    tried, given = lab.tried, ("text.txt", "tiny.toml", "config.toml")
    files = [
        path
        for path in sorted(tried.rglob("*"))
        if path.is_file() and path.stat().st_size and path.name not in given
    ]
    file = chance.choice(files)
    damage(file, chance)
    name = str(file.relative_to(tried))
    ended = lab.train(*(["--resume"] if is_resumed else []))
    lab.ends_well(ended, [0])
    if name == "run/metrics.jsonl":
        lasting = {s: v for s, v in losses(lab.run).items() if s in lab.reference}
        wrong = {s for s, v in lasting.items() if v != lab.reference[s] and s > 4}
        if wrong or max(lasting) != STEPS:
            raise Failure(f"{name}: other losses: {lasting}")
        return 1
    lab.holds(damaged=file)
    # Kernels are compiled again without a word, and every run writes anew what machine it is on. An
    # older checkpoint is not read, nor, by a run that is resumed, the tokenizer it was begun with.
    silent = name.startswith(("kernels", "run/machine.json", "run/step-00000002"))
    silent = silent or (is_resumed and name.startswith("cache/tokenizer-"))
    if not silent and not ended.err.strip():
        raise Failure(f"{name}: nothing is said")
    return 1


def bits_flip_before_loading(lab: Lab, seed: int) -> int:
    """A flipped bit in a file of a model that is evaluated or generates."""
    chance = random.Random(seed)
    lab.anew("done")
    final = lab.run / "final"
    names = ["model.safetensors", "config.json", "tokenizer.model", "manifest.json"]
    name = chance.choice(names)
    damage(final / name, chance)
    if chance.random() < 0.5:
        ended = lab.command("generate", "--model", str(final), "--max-new-tokens", "2")
    else:
        words = ["--data", str(lab.tried / "text.txt")]
        words += ["--cache-dir", str(lab.tried / "cache")]
        ended = lab.command("evaluate", "--model", str(final), *words)
    lab.ends_well(ended, [2])
    if ended.out:
        raise Failure(f"{name}: a result was printed: {ended.out}")
    return 1


def damage(file: Path, chance: random.Random) -> None:
    """One flipped bit, or a cut, or a block of zeros."""
    data = bytearray(file.read_bytes())
    kind = chance.random()
    if kind < 0.8:
        bit = chance.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
    elif kind < 0.9:
        data = data[: chance.randrange(len(data))]
    else:
        start = chance.randrange(len(data))
        length = min(len(data) - start, 512)
        zeros = bytes(length)
        data[start : start + length] = zeros if data[start : start + length] != zeros else b"x"
    file.write_bytes(data)


def readers_hold(lab: Lab, seed: int) -> int:
    """A reader that holds every file of old checkpoints open while they are pruned."""
    lab.anew("stopped")
    with contextlib.ExitStack() as held:
        for path in sorted(lab.run.rglob("*")):
            if path.is_file():
                held.enter_context(open(path, "rb"))
        lab.ends_well(lab.train("--resume"), [0])
        lab.holds()
    return 1


def immutable(lab: Lab, seed: int) -> int:
    """An old checkpoint with a file that cannot be removed."""
    lab.anew("stopped")
    old = lab.run / "step-00000002"
    held = old / random.Random(seed).choice(["model.safetensors", "config.json", "manifest.json"])
    done = subprocess.run(["chattr", "+i", held], capture_output=True)
    if done.returncode:
        raise Skipped("this file system has no immutable files")
    try:
        ended = lab.train("--resume", "--set", "checkpointing.keep_last_n=1")
        lab.ends_well(ended, [0])
        if ended.err.count("cannot be removed and stays") != 1:
            raise Failure(f"not said once: {ended.err}")
    finally:
        found = next(lab.run.rglob(held.name), held)
        for path in lab.run.rglob(held.name):
            found = path
            subprocess.run(["chattr", "-i", found], capture_output=True)
    return 1
