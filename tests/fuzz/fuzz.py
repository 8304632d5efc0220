"""Fuzz every parser and every C kernel, guided by coverage: `make fuzz`.

    python tests/fuzz/fuzz.py [--seconds 60] [--lanes 2] [--out docs/reliability.md]

Parsers run under atheris (parsers.py, targets.py), kernels (kernels/*_fuzz.c) under libFuzzer with
the address and undefined-behaviour sanitizers. Each begins with the inputs in corpus/ and ends with
a count; what breaks a rule is printed, its input stays in the folder that the last line names, and
the exit code is 1.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS = HERE / "kernels"
# As the tests of the kernels build them; -O1 takes minutes for a product.
BUILD = [
    "clang", "-O0", "-fno-math-errno", "-Wno-psabi", "-march=native", "-fno-sanitize-recover=all",
    "-fsanitize=fuzzer,address,undefined", "-fsanitize-trap=undefined",
]  # fmt: skip
PARSERS_SHARE = 0.5  # of the time


@dataclass
class Result:
    """Of one parser or kernel."""

    name: str
    inputs: int
    findings: list[str]


def variants(source: Path) -> list[str]:
    """The lists of flags of a kernel's fuzzer, each as one string."""
    lines = [line for line in source.read_text().splitlines() if line.startswith("// variants:")]
    return [
        " ".join(flags.split())
        for line in lines
        for flags in line.removeprefix("// variants:").split(";")
    ]


def builds(seconds: float) -> list[tuple[Path, str]]:
    """What to build; of each kernel only the first form where the time is short."""
    most = 1 if seconds < 300 else None
    return [(s, f) for s in sorted(KERNELS.glob("*_fuzz.c")) for f in variants(s)[:most]]


def fuzz_kernel(source: Path, flags: str, seconds: float, seed: int, folder: Path) -> Result:
    """Build one form of a kernel and fuzz it."""
    name = f"{source.stem.removesuffix('_fuzz')} {flags}"
    place = folder / re.sub(r"\W+", "_", name)
    (place / "corpus").mkdir(parents=True)
    program = str(place / "program")
    built = [*BUILD, *flags.split(), str(source), "-o", program, "-lm"]
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
        capture_output=True, text=True, env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
    )  # fmt: skip
    findings = [done.stderr[-1500:]] if done.returncode else []
    return Result(name, counted(done.stderr), findings)


def counted(log: str) -> int:
    """The inputs of a run, by what libFuzzer prints at its end."""
    found = re.search(r"number_of_executed_units: (\d+)", log)
    return int(found[1]) if found else 0


def fuzz_parsers(seconds: float, seed: int, lanes: int, folder: Path) -> list[Result]:
    """Fuzz every parser, each in a process of its own."""
    corpus, logs = folder / "corpus", folder / "logs"
    shutil.copytree(HERE / "corpus", corpus)
    logs.mkdir()
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "FUZZ_FINDINGS": str(folder),
        "XDG_CACHE_HOME": str(folder / "xdg"),
    }  # fmt: skip
    done = subprocess.run(
        [
            sys.executable, str(HERE / "parsers.py"), "--seconds", str(seconds), "--lanes",
            str(lanes), "--seed", str(seed), "--corpus", str(corpus), "--logs", str(logs),
        ],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        return [Result("parsers", 0, [done.stderr[-1500:]])]
    return [parsed(log) for log in sorted(logs.iterdir())]


def parsed(log: Path) -> Result:
    """What a parser's log says."""
    text = log.read_text(errors="replace")
    findings = re.findall(r"^FINDING (.*)", text, re.MULTILINE)
    findings += re.findall(r"^==\d+== ?(?:ERROR|libFuzzer).*", text, re.MULTILINE)
    inputs = counted(text)
    return Result(log.stem, inputs, findings or ([] if inputs else [text[-500:]]))


def table(parsers: list[Result], kernels: list[Result], seconds: float, seed: int) -> str:
    """The results as Markdown."""
    lines = ["| parser, or kernel and its form | inputs | findings |", "|---|---:|---:|"]
    every = [*parsers, *kernels]
    for result in every:
        lines.append(f"| `{result.name}` | {result.inputs:,} | {len(result.findings)} |")
    inputs, findings = sum(r.inputs for r in every), sum(len(r.findings) for r in every)
    lines.append(f"| **together** | {inputs:,} | {findings} |")
    when = f"{time.strftime('%Y-%m-%d')}, {seconds / 60:.0f} minutes, {os.cpu_count()} processors"
    return "\n".join([*lines, "", f"Seed {seed}; {when}."])


def main() -> int:
    """Fuzz, print the table, and return 1 if anything was found."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--seconds", type=float, default=60, help="of fuzzing, builds aside")
    options.add_argument("--seed", type=int, default=int(time.time()))
    options.add_argument("--lanes", type=int, default=os.cpu_count() or 1, help="at a time")
    options.add_argument("--out", type=Path, help="write the table into this file's marked part")
    given = options.parse_args()
    begun, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="fuzz-found-"))
    sys.path[:0] = [str(ROOT)]
    import targets

    share = given.seconds * given.lanes * PARSERS_SHARE / len(targets.TARGETS)
    parsers = fuzz_parsers(share, given.seed, given.lanes, folder)
    chosen = builds(given.seconds)
    each = given.seconds * given.lanes * (1 - PARSERS_SHARE) / len(chosen)
    with ThreadPoolExecutor(given.lanes) as pool:
        kernels = list(pool.map(lambda b: fuzz_kernel(*b, each, given.seed, folder), chosen))
    text = table(parsers, kernels, time.monotonic() - begun, given.seed)
    print(text)
    findings = [f"{r.name}: {finding}" for r in [*parsers, *kernels] for finding in r.findings]
    if given.out is not None:
        before, rest = given.out.read_text().split("<!-- begin fuzz -->\n", 1)
        _, after = rest.split("<!-- end fuzz -->", 1)
        new = f"{before}<!-- begin fuzz -->\n{text}\n<!-- end fuzz -->{after}"
        given.out.write_text(new)
    if findings:
        print("\n".join([*findings, f"their inputs: {folder}"]))
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
