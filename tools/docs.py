"""Write the parts of docs/ that code and measurements know best: options, files, figures, targets.

python tools/docs.py            rewrite them in place
python tools/docs.py --check    exit code 1 if a page says something else

A generated part lies between `<!-- NAME -->` and `<!-- end of NAME -->`.
"""

import argparse
import ast
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import speed

from tinyllama.cli.arguments import exit_code, leave
from tinyllama.config import option_table
from tinyllama.model.counts import published_claims

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "tinyllama"

# The packages in the order in which the data meets them, which is also the order of imports:
# a package imports only from those before it.
PACKAGES = (
    "system", "config", "formats", "tokenizers", "data", "runtime", "ops", "model", "observe",
    "generate", "train", "convert", "reports", "bench", "cli",
)  # fmt: skip
FOLDERS = {
    "configs/": "The shipped configurations",
    "docs/": "What you are reading",
    "tests/": "The tests, in the same folders as the package",
    "tools/": "Scripts for developers: demo, measurements, proofs",
}


def summary(path: Path) -> str:
    """The first sentence of a file's docstring, without the full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).removesuffix(".")


def packages() -> list[Path]:
    """The folders of the package, in the order of PACKAGES."""
    folders = {path.parent.name: path.parent for path in PACKAGE.glob("*/__init__.py")}
    assert set(folders) <= set(PACKAGES), f"tools/docs.py: PACKAGES lacks {set(folders)}"
    return [folders[name] for name in PACKAGES if name in folders]


def tree() -> str:
    """The folders of the repository, one per line, each with what it is for."""
    lines = ["```text", f"{'tinyllama/':<14}{summary(PACKAGE / '__init__.py')}"]
    lines += [f"  {p.name + '/':<12}{summary(p / '__init__.py')}" for p in packages()]
    lines += [f"{name:<14}{what}" for name, what in FOLDERS.items()]
    return "\n".join([*lines, "```"])


def listed_files() -> dict[str, list[Path]]:
    """Every file to describe, by the heading it stands under."""
    files = {f"tinyllama/{p.name}/": sorted(p.rglob("*.py")) for p in packages()}
    return {
        "tinyllama/": sorted(PACKAGE.glob("*.py")),
        **files,
        "tools/": sorted((ROOT / "tools").glob("*.py")),
    }


def file_list() -> str:
    """Every file of the package and of tools/, with what it is for."""
    lines = []
    for heading, paths in listed_files().items():
        lines += [f"\n### {heading}\n", "| file | what it is |", "|---|---|"]
        for path in paths:
            name = path.relative_to(ROOT / heading).as_posix()
            lines.append(f"| `{name}` | {summary(path).replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def published_table() -> str:
    """What older descriptions of this system say, what is true, and why."""
    lines = ["| | published | true | why |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(claim)} |" for claim in published_claims())])


def make_targets() -> str:
    """What `make help` prints."""
    command = ["make", "--no-print-directory", "help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return f"```text\n{done.stdout.strip()}\n```"


# The generated parts: page -> name of the part -> what writes it.
PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "options.md": {"options": option_table},
    "files.md": {"tree": tree, "files": file_list},
    "accounting.md": {"published": published_table},
    "speed.md": {"speed": speed.report},
    "make.md": {"targets": make_targets},
}


def written(page: str, text: str) -> str:
    """The text of a page with its generated parts as the code has them now."""
    for name, write in PARTS[page].items():
        assert f"<!-- {name} -->" in text, f"docs/{page} has no place for {name}"
        text = placed(text, name, write())
    return text


def placed(page: str, name: str, part: str) -> str:
    """A page with what its part `name` holds now; behind all the rest where it had no such part."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if begin not in page:
        page = f"{page.rstrip()}\n\n{begin}{end}\n"
    before, _, rest = page.partition(begin)
    return f"{before}{begin}{part.strip()}\n{end}{rest.partition(end)[2]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 where --check finds a difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    outdated = []
    for page in PARTS:
        file = DOCS / page
        old = file.read_text(encoding="utf-8")
        new = written(page, old)
        if new != old:
            outdated.append(f"docs/{page}")
            if not options.check:
                file.write_text(new, encoding="utf-8")
    if options.check and outdated:
        print(f"{', '.join(outdated)}: outdated; run python tools/docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    leave(exit_code(main, "docs"))
