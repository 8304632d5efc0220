"""Real runs under real faults, again and again: `make chaos`.

Each try trains, merges or exports a tiny model, does something to the process or to its files, and
then continues as a user would. After each:

    nothing that was saved is lost, and every checkpoint holds its sums
    every loss is, bit for bit, that of a run that nothing happened to
    whatever ended a command was said without a traceback, and nothing half-written stays

A try is made again with `--only KIND --seed SEED --tries 1`, with the seed that it printed.

    lab.py       the folder of a try, the processes, the checks      faults.c  calls that fail
    runs.py, machine.py, writing.py   the kinds of faults            worker.py the processes
    broken_disk.py   a file that cannot be read any more
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import machine
import runs
import writing
from lab import ROOT, Lab, Skipped


@dataclass
class Count:
    """Of one kind of fault: tries, faults that were really made, and what failed."""

    tries: int = 0
    faults: int = 0
    failures: list[str] = field(default_factory=list)
    skipped: str = ""
    begun: int = 0  # tries, those under way too


Try = Callable[[Lab, int], int]

# Each kind, and its share of the tries.
KINDS: dict[str, tuple[Try, float]] = {
    make.__name__: (make, weight)
    for make, weight in (
        (runs.killed, 1.0),
        (runs.terminated, 0.5),
        (runs.paused, 0.2),
        (runs.dies_at_a_call, 2.0),
        (runs.dies_in_a_resume, 1.0),
        (writing.dies_in_an_export, 4.0),
        (writing.dies_in_a_merge, 2.0),
        (writing.dies_in_tokenizing, 2.0),
        (writing.signalled_in_writing, 1.0),
        (runs.signalled_at_a_call, 2.0),
        (writing.signalled_at_a_call_in_writing, 5.0),
        (runs.calls_fail, 1.5),
        (writing.calls_fail_in_writing, 2.0),
        (runs.disk_fills, 0.5),
        (runs.bits_flip, 2.0),
        (runs.bits_flip_before_loading, 1.0),
        (writing.bits_flip_in_models, 1.5),
        (writing.bits_flip_in_files_without_sums, 0.5),
        (runs.readers_hold, 0.1),
        (runs.immutable, 0.1),
        (machine.memory_runs_out, 0.5),
        (machine.processor_is_lent, 0.1),
        (machine.clock_jumps, 0.5),
        (machine.mapped_file_shrinks, 0.5),
        (machine.disk_cannot_be_read, 1.0),
        (machine.two_hosts_in_one_run, 0.3),
        (machine.two_hosts_share_caches, 0.2),
    )
}


class Plan:
    """Which try is next: of each kind so many, times its weight, in turn."""

    def __init__(self, tries: int, seed: int, only: Sequence[str], seconds: float) -> None:
        self.counts = {kind: Count() for kind in KINDS if not only or kind in only}
        self._wanted = {kind: tries * (1.0 if only else KINDS[kind][1]) for kind in self.counts}
        self._seed, self._ends = seed, time.monotonic() + seconds
        self._lock = threading.Lock()

    def next(self) -> tuple[str, int] | None:
        """The kind and the seed of the next try; None where all are made or the time is over."""
        with self._lock:
            open_ = [
                kind for kind, count in self.counts.items()
                if count.begun < self._wanted[kind] and not count.skipped
            ]  # fmt: skip
            if not open_ or time.monotonic() > self._ends:
                return None
            kind = min(open_, key=lambda kind: self.counts[kind].begun / self._wanted[kind])
            count = self.counts[kind]
            count.begun += 1
            return kind, self._seed + count.begun - 1


def chaos(
    tries: int, seed: int, only: Sequence[str], seconds: float, lanes: int = 1
) -> dict[str, Count]:
    """So many tries of each kind, times its weight, in turn; fewer where the time is over. Each
    of the `lanes` has a folder and processes of its own."""
    sys.path.insert(0, str(ROOT))
    plan = Plan(tries, seed, only, seconds)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        threads = [
            threading.Thread(target=_lane, args=(plan, Path(folder).resolve() / str(number)))
            for number in range(lanes)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return plan.counts


def _lane(plan: Plan, folder: Path) -> None:
    folder.mkdir()
    lab = Lab(folder)
    while (found := plan.next()) is not None:
        kind, seed = found
        attempt(lab, kind, KINDS[kind][0], plan.counts[kind], seed)
    lab.close()


def attempt(lab: Lab, kind: str, make: Try, count: Count, seed: int) -> None:
    """One try; what fails is printed with what makes it happen again."""
    try:
        count.faults += make(lab, seed)
    except Skipped as why:
        count.skipped = str(why)
        return
    except Exception as failure:
        why = f"{kind} --seed {seed}: {type(failure).__name__}: {failure}"
        print(why, flush=True)
        count.failures.append(why)
    count.tries += 1


def table(counts: dict[str, Count], seed: int, seconds: float) -> str:
    """The result as Markdown."""
    lines = ["| fault | `--only` | tries | faults made | failures |", "|---|---|---:|---:|---:|"]
    made = {kind: count for kind, count in counts.items() if not count.skipped}
    for kind, count in made.items():
        what = (KINDS[kind][0].__doc__ or kind).splitlines()[0].rstrip(".")
        row = f"{what} | `{kind}` | {count.tries} | {count.faults} | {len(count.failures)}"
        lines.append(f"| {row} |")
    every = list(made.values())
    tries, faults = sum(c.tries for c in every), sum(c.faults for c in every)
    failures = sum(len(c.failures) for c in every)
    lines.append(f"| **together** | | {tries} | {faults} | {failures} |")
    skipped = [f"- `{kind}`: {c.skipped}" for kind, c in counts.items() if c.skipped]
    lines += ["", "Skipped, since this machine cannot make the fault:", *skipped] if skipped else []
    when = f"{time.strftime('%Y-%m-%d')}, {seconds / 60:.0f} minutes, {os.cpu_count()} processors"
    return "\n".join([*lines, "", f"Seeds from {seed} on of each kind; {when}."])


def main() -> int:
    """Try, print the table, and return 1 if anything failed."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--tries", type=int, default=100, help="of each kind, times its weight")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--lanes", type=int, default=1, help="tries at a time (default: 1)")
    options.add_argument("--only", action="append", default=[], choices=list(KINDS))
    options.add_argument("--seconds", type=float, default=7200, help="end after so long")
    options.add_argument("--out", type=Path, help="write the table into this file's marked part")
    given = options.parse_args()
    begun = time.monotonic()
    counts = chaos(given.tries, given.seed, given.only, given.seconds, given.lanes)
    text = table(counts, given.seed, time.monotonic() - begun)
    print(text)
    if given.out is not None:
        before, rest = given.out.read_text().split("<!-- begin chaos -->\n", 1)
        _, after = rest.split("<!-- end chaos -->", 1)
        new = f"{before}<!-- begin chaos -->\n{text}\n<!-- end chaos -->{after}"
        given.out.write_text(new)
    return int(any(count.failures for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
