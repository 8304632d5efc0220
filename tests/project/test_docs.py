"""The docs name what is there: files, links, commands, options, figures that the code computes."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import docs
from tinyllama.config import load_config, option_table
from tinyllama.train.memory_estimate import estimate_memory

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
# A report of a day names files as they were called then.
REPORTS = ("docs/mutants.md",)
EXAMPLE = "squared_relu"  # the operation that CONTRIBUTING.md adds


def shell_of(text: str) -> str:
    """The sh blocks of a page, one command per line."""
    return "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")


def test_the_readme_is_short() -> None:
    assert PAGES["README.md"].count("\n") <= 150


def test_the_option_table_is_the_codes_own() -> None:
    assert option_table().strip() in PAGES["docs/options.md"]


def test_the_published_figures_stand_beside_the_true_ones_and_why() -> None:
    assert docs.published_table() in PAGES["docs/accounting.md"]


@pytest.mark.parametrize("page", docs.PARTS)
def test_the_generated_parts_are_up_to_date(page: str) -> None:
    text = PAGES[f"docs/{page}"]
    assert docs.written(page, text) == text, "run python tools/docs.py"


def test_a_table_that_differs_is_found_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for page in docs.PARTS:
        (tmp_path / page).write_text(PAGES[f"docs/{page}"], encoding="utf-8")
    monkeypatch.setattr(docs, "DOCS", tmp_path)
    assert docs.main(["--check"]) == 0
    altered = PAGES["docs/options.md"].replace("learning_rate` | `0.0003`", "learning_rate` | `1`")
    (tmp_path / "options.md").write_text(altered, encoding="utf-8")
    assert docs.main(["--check"]) == 1
    message = "docs/options.md: outdated; run python tools/docs.py\n"
    assert capsys.readouterr().err == message
    assert (tmp_path / "options.md").read_text(encoding="utf-8") == altered
    assert docs.main([]) == 0
    assert (tmp_path / "options.md").read_text(encoding="utf-8") == PAGES["docs/options.md"]


def test_the_file_list_names_every_file_once() -> None:
    listed = [path for paths in docs.listed_files().values() for path in paths]
    package, tools = (ROOT / "tinyllama").rglob("*.py"), (ROOT / "tools").glob("*.py")
    assert sorted(listed) == sorted([*package, *tools])


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_named_exist(page: str) -> None:
    text, folder = PAGES[page], (ROOT / page).parent
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    assert [link for link in sorted(links) if not (folder / link).exists()] == []
    named = set(
        re.findall(r"(?<![\w/.-])(?:tinyllama|tools|tests|configs|docs)/[\w./-]*\.\w+", text)
    )
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert page in REPORTS or [name for name in missing if EXAMPLE not in name] == []


def test_every_page_is_named_by_another() -> None:
    for page in PAGES:
        others = "\n".join(text for name, text in PAGES.items() if name != page)
        assert page == "README.md" or Path(page).name in others, page


@cache
def help_of(command: str) -> str:
    """What `COMMAND --help` prints."""
    words = [sys.executable, *command.split()[1:], "--help"]
    if command.startswith("tinyllama "):
        words = [sys.executable, "-m", *command.split(), "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def commands(text: str) -> list[str]:
    """The commands of ours in a page's sh blocks, without variables before them."""
    ours = re.compile(r"(?:[A-Z_]+=\S+ )*((?:tinyllama|python -m tinyllama|python tools/).*)")
    return [
        m[1].partition(" # ")[0] for line in shell_of(text).split("\n") if (m := ours.match(line))
    ]


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if commands(text)])
def test_commands_and_their_options_exist(page: str) -> None:
    for command in commands(PAGES[page]):
        name = re.match(r"tinyllama \w+|python -m tinyllama[.\w]*|python tools/\w+\.py", command)
        assert name is not None, command
        if name[0] == "python -m tinyllama.lm_eval":  # the options are lm_eval's own
            continue
        known = set(re.findall(r"--[\w-]+", help_of(name[0])))
        assert set(re.findall(r"--[a-z][\w-]*", command)) <= known, command


def test_options_named_exist() -> None:
    keys = {key for text in PAGES.values() for key in re.findall(r"--set (\w+\.\w+)=", text)}
    assert len(keys) > 8
    unknown = {key for key in keys if f"| `{key}` |" not in option_table()}
    assert unknown == {"section.key"}


def test_targets_of_make_named_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(PAGES.values())
    named = set(re.findall(r"^make ([a-z0-9-]+)", shell_of(text), re.MULTILINE))
    named |= set(re.findall(r"`make ([a-z0-9][\w-]+)", text)) - {"llama"}
    assert {"demo", "test", "venv"} <= named <= targets


def memory_rows() -> list[tuple[str, list[str], float]]:
    """(configuration, overrides, bytes) of each row of docs/out-of-memory.md."""
    rows = []
    _, *sections = re.split(r"^## (\w+)$", PAGES["docs/out-of-memory.md"], flags=re.MULTILINE)
    for name, text in zip(sections[::2], sections[1::2], strict=True):
        for options, gigabytes in re.findall(
            r"^\| (`--set.*`|none.*) \| ([\d.]+) GB \|$", text, re.M
        ):
            overrides = re.findall(r"--set (\S+=\w+)", options)
            rows.append((name, overrides, float(gigabytes) * 1e9))
    return rows


# Planning takes seconds, so one row in four is computed again.
@pytest.mark.parametrize(("name", "overrides", "expected"), memory_rows()[3::4])
def test_the_memory_that_the_docs_name_is_what_is_planned(
    name: str, overrides: list[str], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What this process holds depends on the tests before; a fresh one holds about as much.
    runtime_bytes = "tinyllama.train.memory_estimate._runtime_bytes"
    monkeypatch.setattr(runtime_bytes, lambda config: 170_000_000)
    config = load_config(f"configs/{name}.toml", overrides)
    assert estimate_memory(config).total == pytest.approx(expected, rel=0.1)


def test_every_row_of_the_memory_tables_is_a_valid_configuration() -> None:
    assert {name for name, _, _ in memory_rows()} == {"124m", "7b"}
    assert len(memory_rows()) >= 16
    for name, overrides, _ in memory_rows():
        load_config(f"configs/{name}.toml", overrides)


# Words of this project's early texts that a stranger does not understand at the first reading.
BANNED = r"\b(told|is had|asked for|otherwise than|is another one|in a word|ends in a line)\b"


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "Makefile", "tools/system.sh"])
def test_pages_are_in_plain_english(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    # What stands between code marks, or was generated from docstrings, has its own rules.
    prose = re.sub(r"<!-- (files|tree) -->.*?<!-- end of \1 -->", "", text, flags=re.DOTALL)
    assert re.findall(BANNED, " ".join(prose.split())) == []
