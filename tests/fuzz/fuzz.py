"""Fuzz every parser and every C kernel, guided by coverage: `make fuzz`.

    python tests/fuzz/fuzz.py [--seconds 60] [--lanes 2] [--record FILE] [--out docs/reliability.md]

Parsers run under atheris (parsers.py, targets.py), kernels (kernels/*_fuzz.c) under libFuzzer with
the address and undefined-behaviour sanitizers. Each begins with the inputs in corpus/ and ends with
a count; what breaks a rule is printed, its input stays in the folder that the last line names, and
the exit code is 1. `--record` adds a line of JSON per target to a file, as soon as it is done: the
table of `--out` sums these up.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS = HERE / "kernels"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ops")]

from builds import COMMON, ENVIRONMENT, SILENT, variants  # noqa: E402

BUILD = ["clang", *COMMON, "-fsanitize=fuzzer,address,undefined", *SILENT]
LONG_SECONDS = 300  # of a run that is worth minutes of building
PARSERS_SHARE = 0.5  # of the time


@dataclass
class Result:
    """Of one parser or kernel."""

    name: str
    inputs: int
    findings: list[str]


Report = Callable[[Result], None]


def builds(seconds: float, only: Sequence[str]) -> list[tuple[Path, str]]:
    """What to build; of each kernel only the first form where the time is short."""
    most = None if seconds >= LONG_SECONDS else 1
    sources = [s for s in sorted(KERNELS.glob("*_fuzz.c")) if not only or kernel_name(s) in only]
    return [(source, flags) for source in sources for flags in variants(source)[:most]]


def kernel_name(source: Path) -> str:
    return source.stem.removesuffix("_fuzz")


def level(seconds: float, flags: str) -> str:
    """-O1 takes half a minute for a kernel, 2 minutes for a packed product, and makes three times
    as many inputs per second."""
    return "-O1" if seconds >= LONG_SECONDS and "-DPACKED" not in flags else "-O0"


def fuzz_kernel(
    source: Path, flags: str, optimized: str, seconds: float, seed: int, folder: Path
) -> Result:
    """Build one form of a kernel and fuzz it."""
    name = f"{kernel_name(source)} {flags}"
    place = folder / re.sub(r"\W+", "_", name)
    (place / "corpus").mkdir(parents=True)
    program = str(place / "program")
    built = [*BUILD, optimized, *flags.split(), str(source), "-o", program, "-lm"]
    done = subprocess.run(built, capture_output=True, text=True)
    if done.returncode:
        return Result(name, 0, [f"does not build: {done.stderr[-500:]}"])
    kept = HERE / "corpus" / source.stem
    done = subprocess.run(
        [
            program, str(place / "corpus"), *([str(kept)] if kept.is_dir() else []),
            f"-max_total_time={max(1, round(seconds))}", "-max_len=400", f"-seed={seed}",
            "-print_final_stats=1", "-timeout=60", f"-artifact_prefix={place}/",
        ],
        capture_output=True, text=True, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    findings = [done.stderr[-1500:]] if done.returncode else []
    return Result(name, counted(done.stderr), findings)


def counted(log: str) -> int:
    """The inputs of a run, by what libFuzzer prints at its end."""
    found = re.search(r"number_of_executed_units: (\d+)", log)
    return int(found[1]) if found else 0


def fuzz_parsers(
    names: Sequence[str], seconds: float, seed: int, lanes: int, folder: Path, report: Report
) -> None:
    """Fuzz parsers, each in a process of its own."""
    corpus, logs = folder / "corpus", folder / "logs"
    shutil.copytree(HERE / "corpus", corpus)
    logs.mkdir()
    environment = {
        **os.environ, "DEV": "CPU", "PYTHONPATH": str(ROOT), "FUZZ_FINDINGS": str(folder),
        "XDG_CACHE_HOME": str(folder / "xdg"),
    }  # fmt: skip
    command = [
        sys.executable, str(HERE / "parsers.py"), *names, "--seconds", str(seconds), "--lanes",
        str(lanes), "--seed", str(seed), "--corpus", str(corpus), "--logs", str(logs),
    ]  # fmt: skip
    errors = folder / "errors"
    with open(errors, "w") as err, subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=err, text=True
    ) as running:  # fmt: skip
        assert running.stdout is not None
        for line in running.stdout:
            report(parsed(logs / f"{line.strip()}.log"))
    if running.returncode:
        report(Result("parsers", 0, [errors.read_text()[-1500:]]))


def parsed(log: Path) -> Result:
    """What a parser's log says."""
    text = log.read_text(errors="replace")
    findings = re.findall(r"^FINDING (.*)", text, re.MULTILINE)
    findings += re.findall(r"^==\d+== ?(?:ERROR|libFuzzer).*", text, re.MULTILINE)
    inputs = counted(text)
    return Result(log.stem, inputs, findings or ([] if inputs else [text[-500:]]))


def lines_of(record: Path) -> list[dict[str, Any]]:
    """What runs have added to a record."""
    return [json.loads(line) for line in record.read_text().splitlines()]


def table(lines: list[dict[str, Any]]) -> str:
    """The sums of a record as Markdown: of each parser, of each kernel over its forms; the runs."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    runs: dict[tuple[str, str, int], list[float]] = defaultdict(lambda: [0, 0])
    for line in lines:
        counts = sums[line["name"].split()[0]]
        counts[0] += line["inputs"]
        counts[1] += line["findings"]
        run = runs[line["date"], line["commit"], line["seed"]]
        run[0] += line["inputs"]
        run[1] += line["seconds"]
    rows = ["| parser, or kernel | inputs | findings |", "|---|---:|---:|"]
    rows += [f"| `{name}` | {inputs:,} | {found} |" for name, (inputs, found) in sums.items()]
    inputs, found = (sum(column) for column in zip(*sums.values(), strict=True))
    rows += [f"| **together** | {inputs:,} | {found} |", ""]
    rows += ["| run | commit | `--seed` | processor minutes | inputs |", "|---|---|---:|---:|---:|"]
    for (date, commit, seed), (inputs, seconds) in runs.items():
        rows.append(f"| {date} | {commit} | {seed} | {seconds / 60:.0f} | {inputs:,} |")
    return "\n".join(rows)


def written(out: Path, text: str) -> None:
    """Replace the marked part of a page."""
    before, rest = out.read_text().split("<!-- begin fuzz -->\n", 1)
    _, after = rest.split("<!-- end fuzz -->", 1)
    out.write_text(f"{before}<!-- begin fuzz -->\n{text}\n<!-- end fuzz -->{after}")


def commit() -> str:
    """The commit that is fuzzed, if that is known."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "unknown"


def arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--seconds", type=float, default=60, help="of fuzzing, builds aside")
    options.add_argument("--seed", type=int, default=int(time.time()))
    options.add_argument("--lanes", type=int, default=os.cpu_count() or 1, help="at a time")
    options.add_argument("--only", action="append", default=[], help="a parser, or a kernel")
    options.add_argument("--record", type=Path, help="add a line per target to this file")
    options.add_argument("--out", type=Path, help="write the sums of the record into this page")
    return options.parse_args()


def fuzz(given: argparse.Namespace, folder: Path, report: Report) -> None:
    """Fuzz what is chosen, parsers first; `report` gets each result."""
    import targets

    names = [name for name in targets.TARGETS if not given.only or name in given.only]
    chosen = builds(given.seconds, given.only)
    share = PARSERS_SHARE if names and chosen else 1.0
    if names:
        each = given.seconds * given.lanes * share / len(names)
        fuzz_parsers(names, each, given.seed, given.lanes, folder, report)
    if chosen:
        each = given.seconds * given.lanes * (1 - share * bool(names)) / len(chosen)

        def one(build: tuple[Path, str]) -> None:
            optimized = level(given.seconds, build[1])
            report(fuzz_kernel(*build, optimized, each, given.seed, folder))

        with ThreadPoolExecutor(given.lanes) as pool:
            list(pool.map(one, chosen))


def main() -> int:
    """Fuzz, print the table, and return 1 if anything was found."""
    given = arguments()
    folder, findings = Path(tempfile.mkdtemp(prefix="fuzz-found-")), list[str]()
    record = given.record or folder / "record"
    record.touch()
    run = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "seed": given.seed}
    last, lock = [time.monotonic()], threading.Lock()

    def report(result: Result) -> None:
        with lock, open(record, "a") as file:
            now = time.monotonic()
            seconds, last[0] = (now - last[0]) * given.lanes, now
            line = {"name": result.name, "inputs": result.inputs, "findings": len(result.findings)}
            file.write(json.dumps({**run, **line, "seconds": round(seconds)}) + "\n")
            findings.extend(f"{result.name}: {finding}" for finding in result.findings)

    fuzz(given, folder, report)
    print(table(lines_of(record)))
    if given.out is not None:
        written(given.out, table(lines_of(record)))
    if findings:
        print("\n".join([*findings, f"their inputs: {folder}"]))
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
