"""The README's commands run, what it names is there, and its tables are the code's own."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import readme

from tinyllama.config import option_table

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MARK = "<!-- tested -->\n```sh\n"
TESTED = [part.partition("```")[0] for part in TEXT.split(MARK)[1:]]
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL))
# What a reader has and we have not: files the README's examples stand for.
EXAMPLES = (".demo/", "checkpoints/", "data/", "path/", "text/", "step-")


def test_the_readme_marks_commands_as_tested() -> None:
    assert TEXT.count("<!-- tested -->") == len(TESTED) >= 3


@pytest.mark.parametrize("block", TESTED)
def test_commands_run(block: str, tmp_path: Path) -> None:
    for name in ("configs", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.txt").write_text(TEXT)
    (tmp_path / "data" / "val.txt").write_text(TEXT[-3000:])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip(), "a command that shows nothing needs no place in a README"


def test_the_option_table_is_the_codes_own() -> None:
    assert option_table().strip() in TEXT


def test_the_published_figures_stand_beside_the_true_ones_and_why() -> None:
    assert readme.published_table() in TEXT


def test_the_generated_parts_are_up_to_date() -> None:
    assert readme.written(TEXT) == TEXT, "run python tools/readme.py"


def test_a_table_that_differs_is_found() -> None:
    altered = TEXT.replace("`training.learning_rate` | `0.0003`", "`training.learning_rate` | `1`")
    assert altered != TEXT
    assert readme.written(altered) == TEXT


def test_the_file_list_names_every_file_once() -> None:
    package = ROOT / "tinyllama"
    listed = [readme.path_of(module) for line in readme.THE_WAY.values() for module in line.split()]
    assert sorted(listed) == sorted(package.rglob("*.py"))


def test_files_named_exist() -> None:
    named = set(re.findall(r"(?<![\w/.-])[\w.-]*\w/[\w./-]*\.\w+", TEXT))
    named |= {link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link}
    ours = {name for name in named if not name.startswith(EXAMPLES)}
    assert len(ours) > 20
    assert [name for name in sorted(ours) if not (ROOT / name).exists()] == []


def test_commands_named_exist() -> None:
    modules = set(re.findall(r"python -m (tinyllama[.\w]*)", TEXT))
    assert {"tinyllama.train", "tinyllama.evaluate", "tinyllama.generate"} <= modules
    assert [m for m in sorted(modules) if importlib.util.find_spec(m) is None] == []
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z0-9-]+)", SHELL)) | set(re.findall(r"`make ([\w-]+)", TEXT))
    assert {"demo", "test"} <= named <= targets


def test_options_named_in_commands_exist() -> None:
    keys = set(re.findall(r"--set (\w+\.\w+)=", SHELL))
    assert len(keys) > 5
    assert [key for key in sorted(keys) if f"| `{key}` |" not in option_table()] == []


def test_the_list_of_make_targets_is_makes_own() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in TEXT
