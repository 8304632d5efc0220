"""The project's own quality: a tree that became worse is refused, and what is recorded is true."""

import subprocess
from pathlib import Path

import pytest
import quality

FUNCTIONS = "\n\n".join(
    f'def function_{i}(value: int) -> int:\n    """Add {i}."""\n    return value + {i}'
    for i in range(12)
)


def git(tree: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=tree, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small project in a repository of its own, with one line of figures."""
    root = tmp_path / "project"
    package = root / "tinyllama"
    package.mkdir(parents=True)
    (root / "docs").mkdir()
    (package / "__init__.py").write_text('"""A package."""\n')
    (package / "__main__.py").write_text('"""A command."""\n\nprint("usage")\n')
    (package / "functions.py").write_text(f'"""Functions."""\n\n\n{FUNCTIONS}\n')
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "small"\nversion = "1"\n[tool.setuptools]\npackages = ["tinyllama"]\n'
    )
    git(tmp_path, "init", "--quiet", str(root))
    return root


def test_a_tree_that_became_worse_in_every_way_is_worse_in_each_figure(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "STARTS", 2)
    before = quality.measured(tree, quality.QUICK)
    assert quality.worse(before, before) == []
    functions = tree / "tinyllama" / "functions.py"
    branches = "".join(f"    if value == {i}:\n        return {i}\n" for i in range(11))
    complex_one = f'\n\ndef complicated(value: int) -> int:\n    """Too much."""\n{branches}'
    functions.write_text(functions.read_text() + complex_one + "    return 0\n")
    (tree / "tinyllama" / "copied.py").write_text(functions.read_text())
    (tree / "tinyllama" / "__init__.py").write_text(
        '"""A package that is slow to import."""\n\nsum(range(5_000_000))\n'
    )
    said = "\n".join(quality.worse(before, quality.measured(tree, quality.QUICK)))
    assert "complexity_most 12, at most 10 is allowed" in said
    assert [name for name in before if f"{name} " not in said] == []


@pytest.fixture
def figures(tree: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the one part measures that is left."""
    found = {"lines": 100.0, "grade_mean": 60.0}
    monkeypatch.setattr(quality, "QUICK", (lambda root: dict(found),))
    return found


def test_a_tree_that_is_worse_is_refused_and_recorded_only_with_a_reason(
    tree: Path, figures: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> int:
        return quality.main(["--quick", "--root", str(tree), *words])

    assert run("--record") == 0 and run() == 0
    figures["lines"] = 120.0
    before = (tree / quality.LINES).read_text()
    capsys.readouterr()
    assert run() == 1
    assert "worse: lines 120, was 100 (noise 5)" in capsys.readouterr().err
    assert run("--record") == 1 and (tree / quality.LINES).read_text() == before
    (tree / "tinyllama" / "more.py").write_text("more = 1\n")
    assert run("--record", "--accept", "a test") == 0
    _, second = quality.read_lines(tree)
    assert second["accepted"] == "a test" and second["figures"]["lines"] == 120
    assert "`: a test" in (tree / quality.PAGE).read_text()
    assert (tree / quality.PICTURE).read_text().count("<svg") == 1
    assert run() == 0


def test_a_better_tree_and_noise_pass_and_what_is_worse_beyond_noise_does_not() -> None:
    before = {"grade_mean": 60.0, "wheel_bytes": 1000.0, "help_starts": 4.0, "coverage": 95.0}
    assert quality.worse(before, {name: value * 1.001 for name, value in before.items()}) == []
    assert (
        quality.worse(before, {"grade_mean": 59.1, "wheel_bytes": 1049, "help_starts": 4.9}) == []
    )
    assert quality.worse(before, {"grade_mean": 90.0, "wheel_bytes": 1, "coverage": 99.0}) == []
    for name, value in (("grade_mean", 58.9), ("wheel_bytes", 1051), ("coverage", 94.4)):
        (sentence,) = quality.worse(before, {name: value})
        assert sentence.startswith(f"{name} {value:.5g}, was {before[name]:.5g}")
    assert quality.worse({}, {"grade_mean": 1.0}) == []
    assert len(quality.worse({}, {"complexity_most": 11})) == 1  # whatever was before


def test_a_tree_is_its_files_without_the_figures_committed_or_not(tree: Path) -> None:
    first = quality.tree_of(tree)
    (tree / quality.LINES).write_text("{}\n")
    assert quality.tree_of(tree) == first
    git(tree, "add", "--all")
    git(tree, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "first")
    assert quality.tree_of(tree) == first
    (tree / "tinyllama" / "functions.py").write_text("other = 1\n")
    assert quality.tree_of(tree) != first


def test_a_line_is_replaced_for_its_tree_and_takes_over_what_was_not_measured(tree: Path) -> None:
    quality.add_line(tree, {"lines": 10.0, "coverage": 90.0}, None)
    quality.add_line(tree, {"lines": 11.0, "coverage": 91.0}, None)
    (one,) = quality.read_lines(tree)
    assert one["figures"] == {"lines": 11.0, "coverage": 91.0} and "of" not in one
    (tree / "tinyllama" / "more.py").write_text("more = 1\n")
    quality.add_line(tree, {"lines": 12.0}, None)
    one, two = quality.read_lines(tree)
    assert two["figures"] == {"lines": 12.0, "coverage": 91.0}
    assert two["of"] == {"coverage": one["tree"]}
    (tree / "tinyllama" / "yet_more.py").write_text("more = 2\n")
    quality.add_line(tree, {"lines": 13.0}, None)
    three = quality.read_lines(tree)[-1]
    assert three["of"] == {"coverage": one["tree"]}
    shown = quality.page(quality.read_lines(tree))
    assert "| lines of code | 13 | 12 | 11 |" in shown
    assert "| coverage, % | (91) | (91) | 91 |" in shown


def test_the_packages_that_are_audited_are_those_that_the_package_requires() -> None:
    found = dict(quality.required(["Tokenizers>=0.20", "numpy", "not-there; sys_platform"]))
    assert {"tokenizers", "huggingface-hub", "numpy"} <= set(found)
    assert not {"torch", "pytest", "not-there"} & set(found)


def test_packages_that_nobody_could_ask_about_are_no_clean_audit() -> None:
    clean, bad = {"name": "a", "vulns": []}, {"name": "b", "vulns": [{"id": "1"}, {"id": "2"}]}
    assert quality.vulnerabilities([clean, bad]) == {"vulnerabilities": 2}
    assert quality.vulnerabilities([clean, {"name": "c", "skip_reason": "not found"}]) == {}


def test_every_part_gives_figures_that_are_described() -> None:
    root = quality.ROOT
    assert set(quality.complexity(root) | quality.grade(root)) <= set(quality.FIGURES)
    lines = quality.read_lines(root)
    assert lines and all(set(line["figures"]) <= set(quality.FIGURES) for line in lines)
    assert (root / quality.PAGE).read_text() == quality.page(lines)
