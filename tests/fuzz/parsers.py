"""Every parser as a function of bytes, for the coverage-guided fuzzer (atheris: fuzz.py runs it).

    python tests/fuzz/parsers.py NAME --seconds 60 --corpus FOLDER --logs FOLDER

Per input: our own exceptions and nothing else, less than 2 s of processor time, less than 200 MB,
and a message of short, printable lines. A finding is printed once, its input is kept in
FUZZ_FINDINGS, and the fuzzer goes on.
"""

import argparse
import json
import os
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import atheris
except ImportError:  # the tests replay inputs without it
    atheris = None

if atheris is not None and __name__ == "__main__":
    with atheris.instrument_imports(include=["tinyllama"]):
        import targets
else:
    import targets

from tinyllama.errors import TinyllamaError

MOST_SECONDS, MOST_BYTES = 2.0, 200 << 20
MOST_LINES, MOST_LINE = 25, 1500
# Values that a number, a word, a list in JSON is replaced by.
ODD: tuple[Any, ...] = (
    0, -1, 1, 2, 255, 65536, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**30, 1e308, -0.5, 1e-320,
    float("nan"), float("inf"), True, False, None, "", "\0", "\x1b[31m", "../../etc/passwd", "/",
    "a" * 300, "\ud800", [], {}, [[]], [None], {"": None}, [1, 2], "none", "\u202e", "1e999",
)  # fmt: skip


class Judge:
    """Runs a parser on inputs, and says what breaks the rules."""

    def __init__(self, name: str) -> None:
        self.folder = targets.new_folder()
        self.parse: Callable[[bytes], None] = targets.TARGETS[name](self.folder)
        self.name = name
        self.peak = _peak_bytes()
        self.seen: set[str] = set()

    def problem(self, data: bytes) -> str | None:
        """What is wrong about an input's treatment, in a word and the place; None if nothing."""
        begun = time.perf_counter()  # the processor's time takes 0.5 ms to ask for
        wrong = self._outcome(data)
        if wrong is None and time.perf_counter() - begun > MOST_SECONDS:
            begun = time.process_time()
            self._outcome(data)
            if (seconds := time.process_time() - begun) > MOST_SECONDS:
                wrong = f"slow: {seconds:.1f} s"
        peak = _peak_bytes()
        grown, self.peak = peak - self.peak, peak
        if wrong is None and grown > MOST_BYTES:
            wrong = f"large: {grown >> 20} MB"
        return wrong

    def _outcome(self, data: bytes) -> str | None:
        try:
            self.parse(data)
        except TinyllamaError as error:
            return _wrong_words(str(error))
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f for f in frames if "tinyllama" in f.filename] or list(frames)
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
            return f"{type(error).__name__} at {place}: {str(error)[:150]!r}"
        return None

    def one(self, data: bytes) -> None:
        """An input of the fuzzer: a finding is printed and kept, once per place."""
        wrong = self.problem(data)
        if wrong is None:
            return
        place = wrong.partition(": ")[0]
        if place not in self.seen:
            self.seen.add(place)
            print(f"FINDING {self.name}: {wrong}", flush=True)
            if folder := os.environ.get("FUZZ_FINDINGS"):
                kept = Path(folder) / f"{self.name}-{len(self.seen)}-{os.getpid()}"
                kept.write_bytes(data)


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _wrong_words(message: str) -> str | None:
    lines = message.split("\n")
    if not message.strip():
        return "empty: no message"
    if len(lines) > MOST_LINES or max(map(len, lines)) > MOST_LINE:
        return f"long: {len(lines)} lines, the longest of {max(map(len, lines))} characters"
    if not all(line.isprintable() for line in lines):
        return f"unprintable: {message[:200]!r}"
    return None


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """JSON with another value somewhere, in half the cases; else other bytes."""
    chance = random.Random(seed)
    if chance.random() < 0.5 and data[:1] in b"{[":
        try:
            changed = json.dumps(_changed(json.loads(data), chance)).encode()
        except (ValueError, RecursionError):
            return bytes(atheris.Mutate(data, most))
        if len(changed) <= most:
            return changed
    return bytes(atheris.Mutate(data, most))


def _changed(value: Any, chance: random.Random) -> Any:
    """A copy with one value replaced, left out or twice."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        if chance.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if chance.random() < 0.1:
            return value | {str(chance.choice(ODD)): value[key]}
        return value | {key: _changed(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.9:
        at = chance.randrange(len(value))
        if chance.random() < 0.2:
            return [*value, value[at]]
        return [*value[:at], _changed(value[at], chance), *value[at + 1 :]]
    return chance.choice(ODD)


def fuzz(name: str, corpus: Path, seconds: float, seed: int) -> None:
    """Fuzz one parser in this process, which libFuzzer ends."""
    judge = Judge(name)
    found = corpus / name
    found.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(targets.seeds(name)):
        (found / f"seed-{number}").write_bytes(data)
    longest = max(len(data) for data in targets.seeds(name)) + 256
    options = [
        f"-max_total_time={max(1, round(seconds))}", "-print_final_stats=1", "-verbosity=1",
        f"-max_len={longest}", "-timeout=30", "-rss_limit_mb=3000", f"-seed={seed}",
        f"-artifact_prefix={os.environ.get('FUZZ_FINDINGS', str(corpus))}/{name}-",
    ]  # fmt: skip
    mutator = {"custom_mutator": mutate} if name in targets.JSON else {}
    atheris.Setup([sys.argv[0], *options, str(found)], judge.one, **mutator)
    atheris.Fuzz()


def main() -> int:
    """Fuzz parsers in turn, each in a process of its own, some at a time; print which is done."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("names", nargs="*", default=list(targets.TARGETS), metavar="NAME")
    options.add_argument("--seconds", type=float, default=10, help="for each parser")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--lanes", type=int, default=1, help="parsers at a time (default: 1)")
    options.add_argument("--corpus", type=Path, required=True, help="folders of inputs, by name")
    options.add_argument("--logs", type=Path, required=True, help="folder for a log of each")
    given = options.parse_args()
    waiting, running = list(given.names), dict[int, str]()
    targets.prepare()
    while waiting or running:
        if waiting and len(running) < given.lanes:
            name = waiting.pop(0)
            if (process := os.fork()) == 0:
                log = os.open(given.logs / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1), os.dup2(log, 2)
                fuzz(name, given.corpus, given.seconds, given.seed)
            running[process] = name
        else:
            process, _ = os.wait()
            print(running.pop(process), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
