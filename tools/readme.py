"""Write the parts of README.md that code and measurements know best: options, files, figures.

python tools/readme.py            rewrite them in place
python tools/readme.py --check    exit code 1 if the README says something else
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import speed

from tinyllama.cli.arguments import exit_code, leave
from tinyllama.config import option_table
from tinyllama.model.counts import published_claims

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

# The files in the order in which the data meets them; each is described by its own first line.
THE_WAY = {
    "The machine": "errors version system",
    "Configuration": "config",
    "Files of other programs": "formats",
    "Text to tokens to batches": "tokenizers data",
    "How operations run": "runtime",
    "Operations": "ops",
    "Model and adapters": "model",
    "What a run says": "observe",
    "Text from a model": "generate",
    "Training": "train",
    "Models from models": "convert",
    "What is said afterwards": "reports",
    "Benchmark": "bench",
    "Command line": "cli tinyllama __main__ evaluate backends",
}


def files_of(name: str) -> list[Path]:
    """The files of a package, or the one file of that name."""
    package = ROOT / "tinyllama"
    if name == "tinyllama":
        return [package / "__init__.py"]
    folder = package / name
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [package / f"{name}.py"]


def first_sentence(path: Path) -> str:
    """The first line or two of a file's docstring, without the full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).removesuffix(".")


def file_list() -> str:
    """Every file of the package, and the tools, each with what it is for."""
    lines = ["| file | what it is |", "|---|---|"]
    for heading, modules in THE_WAY.items():
        lines.append(f"| **{heading}** | |")
        lines += [_row(path) for module in modules.split() for path in files_of(module)]
    lines.append("| **Tools** | |")
    lines += [_row(path) for path in sorted((ROOT / "tools").glob("*.py"))]
    return "\n".join(lines)


def published_table() -> str:
    """What older descriptions of this system say, what is true, and why."""
    lines = ["| | published | true | why |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(claim)} |" for claim in published_claims())])


def written(text: str) -> str:
    """README text with its generated parts as the code has them now."""
    parts = {
        "options": option_table(),
        "files": file_list(),
        "published": published_table(),
        "speed": speed.report(),
    }
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        assert begin in text and end in text, f"README.md has no place for {name}"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}{part.strip()}\n{end}{rest.partition(end)[2]}"
    return text


def _row(path: Path) -> str:
    sentence = first_sentence(path).replace("|", "\\|")
    return f"| `{path.relative_to(ROOT).as_posix()}` | {sentence} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 where --check finds a difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    old = README.read_text(encoding="utf-8")
    new = written(old)
    if not options.check:
        README.write_text(new, encoding="utf-8")
    elif new != old:
        print("README.md is behind the code: run python tools/readme.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    leave(exit_code(main, "readme"))
