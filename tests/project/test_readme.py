"""README's commands, typed by a reader: in a fresh clone, with an empty home, in one shell session.

The clone holds the working tree as it is, changes that are not committed included. It makes its own
.venv with README's commands, so this test needs the package registry; `make readme` runs it alone.
"""

import faulthandler
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tinyllama.system import device

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MARK = "<!-- needs a GPU or Llama 2: runs smaller -->"
BUDGET_SECONDS = 10  # of `make demo`: passed in the environment, so that the command stays as typed
# Appended to the training commands of marked blocks: the sizes of the demo's model, two steps.
SMALLER = {
    "model.num_layers": 3,
    "model.hidden_size": 256,
    "model.num_heads": 4,
    "model.intermediate_size": 1152,
    "model.vocab_size": 4096,
    "model.max_seq_len": 256,
    "data.context_length": 64,
    "data.val_path": ".demo/val_part.jsonl",
    "training.batch_size": 4,
    "training.max_steps": 2,
}
LLAMA_2 = "path/to/Llama-2-7b-hf"  # what the first training of README made stands for it
STAND_IN = f"mkdir -p {Path(LLAMA_2).parent} && cp -r checkpoints/first/final {LLAMA_2}"


class Block(NamedTuple):
    """A fenced block, whether it is marked, and what the text block after it says is printed."""

    marked: bool
    language: str
    body: str
    printed: str


def blocks(text: str) -> Iterator[Block]:
    """The sh and python blocks of a Markdown text, in order."""
    fence = re.compile(r"(<!--[^\n]*-->\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    found = [(match[1] or "", match[2], match[3]) for match in fence.finditer(text)]
    for (mark, language, body), (_, after, printed) in zip(
        found, [*found[1:], ("", "", "")], strict=True
    ):
        if language in ("sh", "python"):
            yield Block(MARK in mark, language, body, printed if after == "text" else "")


def smaller(body: str, gpu: bool) -> str:
    """The commands of a marked block with smaller sizes, and without GPU=1 where there is none."""
    commands = body.replace("\\\n", " ").splitlines()
    sizes = "".join(f" --set {key}={value}" for key, value in SMALLER.items())
    trains = re.compile(r"\btinyllama[ .]train ")
    smaller = [command + sizes if trains.search(command) else command for command in commands]
    text = "\n".join(smaller) + "\n"
    return text if gpu else text.replace("GPU=1 ", "")


def typed(block: Block, gpu: bool) -> str:
    """What a reader types for a block."""
    if block.language == "python":
        return f"python - <<'END_OF_PYTHON'\n{block.body}END_OF_PYTHON\n"
    body = smaller(block.body, gpu) if block.marked else block.body
    return re.sub(r"^make test$", "echo make test runs this test", body, flags=re.MULTILINE)


def session(found: list[Block], gpu: bool) -> str:
    """All blocks as one script that prints a line before each, to tell their output apart."""
    parts, made = [], False
    for number, block in enumerate(found):
        if LLAMA_2 in block.body and not made:
            parts.append(STAND_IN)
            made = True
        parts += [f"echo; echo '== block {number}'", typed(block, gpu)]
    return "\n".join(parts)


def is_printed(line: str, output: str) -> bool:
    """Whether a line of the output is this one, where `...` stands for anything."""
    pattern = ".*".join(re.escape(part.strip()) for part in line.split("..."))
    lines = re.split(r"[\r\n]", output)
    return any(re.fullmatch(pattern, candidate.strip()) for candidate in lines)


def expected_lines(block: Block) -> list[str]:
    """The lines that README says a block prints: in the text after it, or beside a print()."""
    return block.printed.splitlines() + re.findall(r"^print\(.*\)  # (.+)$", block.body, re.M)


def readers_environment(home: Path) -> dict[str, str]:
    """As `env -i`: only what finds programs and the network, and not our own .venv."""
    kept = re.compile(r"LANG|CI|\w+_PROXY|\w+_proxy|PIP_\w+|SSL_\w+")
    env = {name: value for name, value in os.environ.items() if kept.fullmatch(name)}
    ours = Path(sys.executable).parent
    path = [entry for entry in os.environ["PATH"].split(os.pathsep) if Path(entry) != ours]
    return {**env, "PATH": os.pathsep.join(path), "HOME": str(home)}


def fresh_clone(folder: Path, env: dict[str, str]) -> Path:
    """A clone of a repository whose only commit is the working tree."""
    repository, clone = folder / "repository.git", folder / "clone"
    who = ["-c", "user.name=reader", "-c", "user.email=reader@localhost"]
    tree = [*who, f"--git-dir={repository}", f"--work-tree={ROOT}"]
    for words in (
        ["init", "--quiet", "--bare", str(repository)],
        [*tree, "add", "--all"],
        [*tree, "commit", "--quiet", "--message", "The working tree"],
        ["clone", "--quiet", str(repository), str(clone)],
    ):
        subprocess.run(["git", *words], cwd=ROOT, env=env, check=True, capture_output=True)
    return clone


@pytest.mark.skipif(shutil.which("git") is None, reason="clones with git")
def test_every_command_runs_as_a_reader_types_it(tmp_path: Path) -> None:
    faulthandler.cancel_dump_traceback_later()  # pytest's, for tests that hang: this one is long
    home = tmp_path / "home"
    home.mkdir()
    env = readers_environment(home)
    clone = fresh_clone(tmp_path, env)
    found = list(blocks(TEXT))
    found_here = device.available()
    gpu = any(not (choice.device == "CPU" or choice.is_opencl_processor) for choice in found_here)

    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", session(found, gpu)],
        cwd=clone, env={**env, "BUDGET": str(BUDGET_SECONDS)}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    outputs = re.split(r"^== block \d+\n", done.stdout, flags=re.MULTILINE)[1:]
    assert len(outputs) == len(found) >= 8
    for block, output in zip(found, outputs, strict=True):
        missing = [line for line in expected_lines(block) if not is_printed(line, output)]
        assert missing == [], f"{block.body}printed\n{output[-4000:]}"
    assert (clone / "checkpoints" / "merged" / "model.safetensors").is_file()
    assert (clone / "checkpoints" / "first" / "report.html").is_file()
    shutil.rmtree(clone)  # pytest keeps folders of earlier runs, and this one holds a .venv


def test_blocks_run_as_they_stand_but_for_marked_ones_and_make_test() -> None:
    found = list(blocks(TEXT))
    for block in found:
        if block.language == "sh" and not block.marked and "make test" not in block.body:
            assert typed(block, gpu=False) == block.body
    marked = [block for block in found if block.marked]
    assert len(marked) == TEXT.count(MARK) >= 2
    for block in marked:  # without a GPU or Llama 2 there is no reason to run smaller
        assert "124m" in block.body or LLAMA_2 in block.body
    assert sum(bool(expected_lines(block)) for block in found) >= 3


def test_marked_commands_are_the_same_with_smaller_sizes_appended() -> None:
    body = "GPU=1 tinyllama train 7b \\\n  --set a.b=1\ntinyllama generate --model x\n"
    train, generate = smaller(body, gpu=False).splitlines()
    assert train.startswith("tinyllama train 7b") and generate == "tinyllama generate --model x"
    words = shlex.split(train)
    assert words[3:5] == ["--set", "a.b=1"] and "training.max_steps=2" in words
    assert smaller(body, gpu=True).startswith("GPU=1 tinyllama train 7b")


def test_a_line_that_is_not_printed_is_noticed() -> None:
    output = "bar 50 %\rbar 100 %\n1,000 parameters, 2 steps\nfinished: step 2, saved a/final\n"
    assert is_printed("1,000 parameters, 2 steps", output)
    assert is_printed("finished: step 2, ... a/final", output)
    assert not is_printed("1,001 parameters, 2 steps", output)
    assert not is_printed("1,000 parameters", output)
