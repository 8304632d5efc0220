"""Break the code on purpose, one place at a time: what share of the changes do the tests notice?

    mutmut changes an operator, a number, a string or an argument; the quick tests that reach the
    changed function run; the change is killed if one of them fails

python tools/mutants.py                                   exit code 1 below 85 %
python tools/mutants.py 'tinyllama.model.lora*' --keep    one file again, and what survives

[tool.mutmut] in pyproject.toml lists the changed files and the tests. A change whose tests time out
twice does not count as killed, because a halted machine would look the same.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinyllama.cli.arguments import exit_code, leave
from tinyllama.model.counts import aligned
from tinyllama.system.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "mutants"  # where mutmut puts its copy
REQUIRED = 0.85
COLUMNS = ("changes", "killed", "survived", "timeout", "no tests")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 below the required share, and mutmut's own if it cannot run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="PATTERN", help="changes to try (default: all)")
    parser.add_argument("--children", type=int, default=os.cpu_count(), help="parallel processes")
    parser.add_argument("--keep", action="store_true", help="keep the results of earlier runs")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    if not options.keep:
        shutil.rmtree(WORK, ignore_errors=True)
    run = ("run", "--max-children", str(options.children))
    code = mutmut(*run, *options.names).returncode
    if code != 0:
        return code
    outcomes = results(options.names)
    late = [name for name, status in outcomes if status == "timeout"]
    if late:  # once more: the machine may have been busy
        mutmut(*run, *late)
        outcomes = results(options.names)
    rows = table(outcomes)
    print(aligned(rows))
    print("\n".join(f"{status}: {name}" for name, status in outcomes if status != "killed"))
    share = killed_share(status for _, status in outcomes)
    print(f"\n{share:.1%} of {len(outcomes)} changes are noticed (required: {REQUIRED:.0%})")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(options.out, report(rows, share).encode())
    return 0 if share >= REQUIRED else 1


def mutmut(*words: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a mutmut command on the CPU, the one device that a forked process can use."""
    command = [str(Path(sys.executable).with_name("mutmut")), *words]
    env = {**os.environ, "DEV": "CPU"}
    stdout = subprocess.PIPE if capture else None
    return subprocess.run(command, env=env, stdout=stdout, text=True, check=False)


def results(patterns: Sequence[str]) -> list[tuple[str, str]]:
    """(change, status) for every change, or for those that a pattern names."""
    outcomes = statuses(mutmut("results", "--all", "true", capture=True).stdout)
    return [x for x in outcomes if not patterns or any(fnmatch(x[0], p) for p in patterns)]


def statuses(text: str) -> list[tuple[str, str]]:
    """(change, status) from the lines that `mutmut results` prints."""
    lines = (line.strip().rpartition(": ") for line in text.splitlines())
    return [(name, status) for name, _, status in lines if "__mutmut_" in name]


def table(outcomes: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """One row per file and one for all: the number of changes, in total and by status."""
    counts: dict[str, Counter[str]] = {}
    for name, status in outcomes:
        file = name.partition(".x")[0].replace(".", "/") + ".py"
        for row in (file, "all"):
            counts.setdefault(row, Counter()).update(["changes", status])
    order = [*sorted(counts.keys() - {"all"}), "all"]
    return [
        {"file": file}
        | {column: str(counts[file][column]) for column in COLUMNS}
        | {"share": f"{counts[file]['killed'] / counts[file]['changes']:.1%}"}
        for file in order
    ]


def killed_share(outcomes: Iterable[str]) -> float:
    """The share of changes that a failing test noticed; timeouts and untested ones do not count."""
    counts = Counter(outcomes)
    return counts["killed"] / max(1, counts.total())


def report(rows: Sequence[dict[str, str]], share: float) -> str:
    """The result as Markdown."""
    lines = [f"| {' | '.join(row.values())} |" for row in rows]
    head = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    versions = f"mutmut {importlib.metadata.version('mutmut')}, Python {platform.python_version()}"
    return (
        f"# Mutants\n\nPrinted by `make mutants` on {datetime.date.today()} with {versions}:"
        f" {share:.1%} of the changes made a test fail (required: {REQUIRED:.0%}).\n"
        "Timeouts, and changes that no test reaches, count as unnoticed. mutmut changes the bodies"
        " of functions and methods,\nbut not properties, nor code at the level of a module or a"
        " class.\n\n" + "\n".join([*head, *lines]) + "\n"
    )


if __name__ == "__main__":
    leave(exit_code(main, "mutants"))
