"""The project's own quality, one line of figures per tree: measured, compared, drawn.

python tools/quality.py --quick     what takes seconds; exit code 1 where it is worse than before
python tools/quality.py --record    all of it, a line in docs/quality.jsonl, docs/quality.md

    complexity    ruff's count of ways through a function (McCabe 1976): none has more than 10
    grade         radon's maintainability index, 0 to 100: mean of all files, and the lowest
    duplication   lines that occur twice, by pylint's symilar, per thousand
    size          lines of code; bytes of the wheel; bytes of what it installs
    start-up      processor time of `import tinyllama` and `tinyllama --help`, in starts of Python
    audit         known vulnerabilities in the installed packages that it requires (pip-audit)
    speed         a training step's operations per second, in those of numpy's product of matrices
                  (processor time; beside PyTorch it is measured by tools/speed.py)
    coverage      per cent of lines that the tests run
    mutation      per cent of deliberate faults that the tests notice

What is measured is compared with the last line. What became worse on purpose is recorded with
--accept "why"; figures that were not measured are taken over from the line before. A tree is
the files that git knows or would add, without docs/quality.*: a commit can hold its own line.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from tinyllama.cli.arguments import exit_code, leave
from tinyllama.system import device
from tinyllama.system.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "tinyllama"
LINES, PAGE, PICTURE = "docs/quality.jsonl", "docs/quality.md", "docs/quality.svg"
MOST_COMPLEX = 10
SIMILAR_LINES = 5  # in a row that are duplicated
STARTS = 9  # processes of each kind
STEPS = 40  # of training
Figures = dict[str, float]


class Figure(NamedTuple):
    """What a figure is called, and by how much it may be worse than before."""

    words: str
    better: int  # 1: a higher one is better; -1: a lower one
    noise: float  # by which it may be worse
    relative: bool = False  # `noise` is a share of the value before


FIGURES = {
    "complexity_most": Figure("most complex function", -1, 0),
    "complexity_mean": Figure("mean complexity", -1, 0.1),
    "grade_mean": Figure("maintainability, mean", 1, 1.0),
    "grade_lowest": Figure("maintainability, lowest", 1, 3.0),
    "duplicated_permille": Figure("duplicated lines, per thousand", -1, 1.0),
    "lines": Figure("lines of code", -1, 0.05, True),
    "wheel_bytes": Figure("wheel, bytes", -1, 0.05, True),
    "installed_bytes": Figure("installed, bytes", -1, 0.05, True),
    "import_starts": Figure("import, in starts of Python", -1, 0.4),
    "help_starts": Figure("--help, in starts of Python", -1, 0.25, True),
    "vulnerabilities": Figure("known vulnerabilities", -1, 0),
    "speed_of_gemm": Figure("speed of a step, in numpy's", 1, 0.15, True),
    "coverage": Figure("coverage, %", 1, 0.5),
    "mutation": Figure("mutation score, %", 1, 1.0),
}


def run(*words: str | Path, cwd: Path, codes: Sequence[int] = (0,)) -> str:
    """What a command prints. Raises RuntimeError where its exit code is not one of `codes`."""
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode not in codes:
        said = (done.stdout[-2000:] + done.stderr[-2000:]).strip()
        raise RuntimeError(f"{words[0]}: exit code {done.returncode}: {said}")
    return done.stdout


def program(name: str) -> Path:
    """A program that was installed beside this Python."""
    return Path(sys.executable).with_name(name)


# ---- what takes seconds


def complexity(root: Path) -> Figures:
    """Of all functions of the package and its tools."""
    limit = ["--select", "C901", "--config", "lint.mccabe.max-complexity=0", "--ignore-noqa"]
    folders = [name for name in (PACKAGE, "tools") if (root / name).is_dir()]
    out = run(
        program("ruff"), "check", "--no-cache", *limit, "--output-format", "json", *folders,
        cwd=root, codes=(0, 1),
    )  # fmt: skip
    pattern = re.compile(r"\((\d+) > 0\)")
    found = [int(match[1]) for x in json.loads(out) if (match := pattern.search(x["message"]))]
    return {"complexity_most": max(found), "complexity_mean": statistics.mean(found)}


def grade(root: Path) -> Figures:
    """Of all files of the package."""
    out = run(program("radon"), "mi", "--json", PACKAGE, cwd=root)
    found = [file["mi"] for file in json.loads(out).values()]
    return {"grade_mean": statistics.mean(found), "grade_lowest": min(found)}


def duplication(root: Path) -> Figures:
    """Of the package's lines, without imports, comments, docstrings and signatures."""
    ignored = ["--ignore-imports", "--ignore-comments", "--ignore-docstrings"]
    files = sorted(str(path.relative_to(root)) for path in (root / PACKAGE).rglob("*.py"))
    words = [*ignored, "--ignore-signatures", "--duplicates", str(SIMILAR_LINES)]
    out = run(program("symilar"), *words, *files, cwd=root)
    match = re.search(r"TOTAL lines=(\d+) duplicates=(\d+)", out)
    if match is None:
        raise RuntimeError(f"symilar says nothing of duplicates: {out[-500:]}")
    return {"duplicated_permille": 1000 * int(match[2]) / max(1, int(match[1]))}


def size(root: Path) -> Figures:
    """Of the package: its lines of Python and C, its wheel, and what is in that."""
    sources = [p for p in (root / PACKAGE).rglob("*") if p.suffix in (".py", ".c", ".h", ".js")]
    lines = sum(path.read_bytes().count(b"\n") for path in sources)
    with tempfile.TemporaryDirectory() as folder:
        tree, out = Path(folder) / "tree", Path(folder) / "wheel"
        for name in files_of(root):  # a build leaves files behind
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, tree / name)
        words = ["wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", out]
        run(sys.executable, "-m", "pip", "--disable-pip-version-check", *words, cwd=tree)
        (wheel,) = out.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            installed = sum(entry.file_size for entry in archive.infolist())
        return {
            "lines": lines, "wheel_bytes": wheel.stat().st_size, "installed_bytes": installed
        }  # fmt: skip


def start_up(root: Path) -> Figures:
    """The least processor time of some processes, in turns, against a Python that does nothing."""
    commands = {
        "nothing": ["-c", "pass"],
        "import_starts": ["-c", f"import {PACKAGE}"],
        "help_starts": ["-m", PACKAGE, "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(STARTS):
        for name, words in commands.items():
            before = _children_seconds()
            run(sys.executable, *words, cwd=root)
            seconds[name].append(_children_seconds() - before)
    least = {name: min(found) for name, found in seconds.items()}
    return {name: least[name] / least["nothing"] for name in commands if name != "nothing"}


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---- what takes minutes


def audit(root: Path) -> Figures:
    """Of the packages that this Python has of those that the package requires, and theirs."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = sorted(f"{name}=={version}" for name, version in required(project["dependencies"]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        file.write_text("\n".join(pins) + "\n")
        words = ["--requirement", file, "--no-deps", "--disable-pip", "--format", "json"]
        out = run(program("pip-audit"), *words, "--progress-spinner", "off", cwd=root, codes=(0, 1))
    if not out.startswith("{"):
        print("audit: not measured: pip-audit reaches no list of vulnerabilities", file=sys.stderr)
        return {}
    return vulnerabilities(json.loads(out)["dependencies"])


def vulnerabilities(packages: Sequence[dict[str, Any]]) -> Figures:
    """Of what pip-audit prints; none of where it could not ask about each package."""
    if unknown := [package["name"] for package in packages if "skip_reason" in package]:
        print(f"audit: not measured: nothing is known of {len(unknown)} packages", file=sys.stderr)
        return {}
    return {"vulnerabilities": sum(len(package["vulns"]) for package in packages)}


def required(requirements: Sequence[str]) -> list[tuple[str, str]]:
    """Name and installed version of these packages, and of all that they require in turn."""
    found: dict[str, str] = {}
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        name = re.split(r"[\s;<>=!~\[(]", requirement, maxsplit=1)[0]
        name = re.sub(r"[-_.]+", "-", name).lower()
        if name in found or "extra ==" in requirement:
            continue
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another system
            continue
        found[name] = package.version
        waiting += package.requires or ()
    return sorted(found.items())


def speed(root: Path) -> Figures:
    """Operations per second of processor time of a training step of the demo, against numpy's
    products of float32 matrices, each with one thread, in turns."""
    import numpy as np
    from profile_overhead import contender
    from threadpoolctl import threadpool_limits

    from tinyllama.config import load_config
    from tinyllama.model.counts import model_flops

    device.select()
    device.set_threads(1)
    config = load_config(str(root / "configs" / "demo.toml"))
    step, context = contender(config), config.context_length
    flops = model_flops(config.model, config.training.batch_size * context, context, None)
    a = np.random.default_rng(0).random((1024, 1024), np.float32)
    steps, products = [], []
    with threadpool_limits(1):
        for number in range(1, STEPS + 1):
            steps.append(_processor_seconds(lambda n=number: step(n)))
            products.append(_processor_seconds(lambda: a @ a))
    return {"speed_of_gemm": flops / min(steps) / (2 * 1024**3 / min(products))}


def _processor_seconds(function: Callable[[], object]) -> float:
    begun = time.process_time()
    function()
    return time.process_time() - begun


def coverage(root: Path) -> Figures:
    """Of all tests: what `make coverage` measures."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "coverage.json"
        words = ["-q", "-n", "auto", "--dist", "worksteal", f"--cov={PACKAGE}"]
        run(sys.executable, "-m", "pytest", *words, f"--cov-report=json:{out}", cwd=root)
        return {"coverage": json.loads(out.read_text())["totals"]["percent_covered"]}


def mutation(root: Path) -> Figures:
    """What `make mutants` measures."""
    out = run(sys.executable, "tools/mutants.py", "--out", "docs/mutants.md", cwd=root)
    match = re.search(r"^([\d.]+)% of \d+ changes are noticed", out, re.M)
    assert match, "tools/mutants.py says no share"
    return {"mutation": float(match[1])}


QUICK = (complexity, grade, duplication, size, start_up)
SLOW = (audit, speed, coverage, mutation)


# ---- lines


def files_of(root: Path) -> list[str]:
    """The files that git knows or would add and that are there."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=root)
    return sorted({name for name in listed.split("\0") if name and (root / name).is_file()})


def tree_of(root: Path) -> str:
    """git's hash of these files without docs/quality.*: no commit changes it."""
    with tempfile.TemporaryDirectory() as folder:
        index = {**os.environ, "GIT_INDEX_FILE": str(Path(folder) / "index")}
        names = [name for name in files_of(root) if not name.startswith("docs/quality.")]
        add = ["git", "update-index", "--add", "-z", "--stdin"]
        subprocess.run(add, cwd=root, env=index, input="\0".join(names).encode(), check=True)
        done = subprocess.run(
            ["git", "write-tree"], cwd=root, env=index, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()


def read_lines(root: Path) -> list[dict[str, Any]]:
    """The lines of docs/quality.jsonl, oldest first."""
    file = root / LINES
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def worse(before: Figures, now: Figures) -> list[str]:
    """One sentence for each figure that is worse than before, beyond its noise."""
    found = []
    if now.get("complexity_most", 0) > MOST_COMPLEX:
        found.append(
            f"complexity_most {now['complexity_most']:g}, at most {MOST_COMPLEX} is allowed"
        )
    for name, value in now.items():
        if name not in before:
            continue
        figure, was = FIGURES[name], before[name]
        noise = figure.noise * (abs(was) if figure.relative else 1)
        if figure.better * (value - was) < -noise - 1e-9:
            found.append(f"{name} {value:.5g}, was {was:.5g} (noise {noise:.3g})")
    return found


def measured(root: Path, parts: Sequence[Callable[[Path], Figures]]) -> Figures:
    """The figures of these parts, each printed as it is known."""
    figures: Figures = {}
    for part in parts:
        begun = time.perf_counter()
        found = part(root)
        shown = ", ".join(f"{name} {value:.5g}" for name, value in found.items())
        print(f"{part.__name__}: {shown} ({time.perf_counter() - begun:.0f} s)", flush=True)
        figures |= {name: round(value, 4) for name, value in found.items()}
    return figures


def add_line(root: Path, figures: Figures, why: str | None) -> None:
    """Add the line of this tree, or replace it where the last one is of this tree; figures that
    were not measured are those of the last line, which `of` names."""
    lines, tree = read_lines(root), tree_of(root)
    last = lines[-1] if lines else {"figures": {}, "tree": tree}
    origin = {name: last.get("of", {}).get(name, last["tree"]) for name in last["figures"]}
    kept = {name: value for name, value in last["figures"].items() if name not in figures}
    line: dict[str, Any] = {"tree": tree, "day": str(datetime.date.today())}
    line["figures"] = {name: (kept | figures)[name] for name in FIGURES if name in kept | figures}
    if of := {name: origin[name] for name in kept if origin[name] != tree}:
        line["of"] = of
    if why:
        line["accepted"] = why
    if lines and last["tree"] == tree:
        lines.pop()
    text = "".join(json.dumps(one) + "\n" for one in [*lines, line])
    atomic_write(root / LINES, text.encode())


# ---- the page


def page(lines: Sequence[dict[str, Any]]) -> str:
    """docs/quality.md: the last lines, newest first; a figure of an earlier tree is in brackets."""
    shown = lines[-8:][::-1]
    head = ["figure", *(f"{line['day']} `{line['tree'][:8]}`" for line in shown)]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, figure in FIGURES.items():
        cells = []
        for line in shown:
            value = line["figures"].get(name)
            text = "" if value is None else _shown(value)
            cells.append(f"({text})" if name in line.get("of", {}) else text)
        rows.append(f"| {figure.words} | {' | '.join(cells)} |")
    accepted = [
        f"- `{line['tree'][:8]}`: {line['accepted']}" for line in shown if "accepted" in line
    ]
    why = ["", "Accepted although it is worse:", "", *accepted] if accepted else []
    intro = (
        "# Quality\n\nWritten by `make quality`: one column per tree (git's hash of all files but "
        "these), newest first. What is\nin brackets was measured at an earlier tree. "
        "`tools/quality.py` says what each figure is; CI measures the first\nten and refuses a "
        "tree that is worse than the last line beyond the figure's noise.\n\n"
    )
    return intro + "\n".join([*rows, *why]) + "\n\n![The figures over time](quality.svg)\n"


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def draw(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """A small chart per figure, over the lines."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "quality"  # the same picture for the same numbers
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(5, 3, figsize=(9, 9), layout="constrained")
    for place, (name, what) in zip(axes.flat, FIGURES.items(), strict=False):
        known = [(i, x["figures"][name]) for i, x in enumerate(lines) if name in x["figures"]]
        place.plot([i for i, _ in known], [v for _, v in known], marker="o", markersize=3)
        place.set_title(what.words, fontsize=8)
        place.set_xticks([])
        place.tick_params(labelsize=7)
        place.ticklabel_format(useOffset=False, style="plain")
    for place in list(axes.flat)[len(FIGURES) :]:
        place.axis("off")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 where a figure is worse than before."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only what takes seconds")
    parser.add_argument("--only", nargs="+", metavar="PART", help="only these parts")
    parser.add_argument("--record", action="store_true", help="write the line of this tree")
    parser.add_argument("--accept", metavar="WHY", help="write it although a figure is worse")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    root, parts = options.root, QUICK if options.quick else (*QUICK, *SLOW)
    if options.only:
        parts = tuple(part for part in parts if part.__name__ in options.only)
    lines = read_lines(root)
    figures = measured(root, parts)
    bad = worse(lines[-1]["figures"] if lines else {}, figures)
    for sentence in bad:
        print(f"quality: worse: {sentence}", file=sys.stderr)
    if bad and not options.accept:
        print('make quality ACCEPT="why" records it all the same', file=sys.stderr)
        return 1
    if options.record:
        add_line(root, figures, options.accept if bad else None)
        lines = read_lines(root)
        atomic_write(root / PAGE, page(lines).encode())
        draw(lines, root / PICTURE)
    return 0


if __name__ == "__main__":
    leave(exit_code(main, "quality"))
