"""The Makefile's targets, what make installs or tells the user to install, and what CI runs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z0-9-]+):.*## ", MAKEFILE, re.MULTILINE)
# What tools/system.sh and .ci/run themselves call.
BASICS = (
    "bash",
    "id",
    "uname",
    "cut",
    "mktemp",
    "tail",
    "rm",
    "mkdir",
    "ln",
    "cat",
    "env",
    "dirname",
)


def run(
    *command: str, path: Path | None = None, venv: str = ".venv"
) -> subprocess.CompletedProcess[str]:
    """A command in the repository, with nothing on its PATH but `path`, if that is given."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    if path is not None:
        env |= {"PATH": str(path), "SYSTEM_PYTHON": "python3", "VENV": venv}
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder of commands as on a machine without compiler, apt-get and sudo."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in BASICS:
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return folder


def command(folder: Path, name: str, body: str) -> None:
    """Put a shell script called `name` into `folder`."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def test_help_is_the_default_and_lists_every_target() -> None:
    for words in (("make",), ("make", "help")):
        done = run(*words)
        assert re.findall(r"^make ([\w-]+)", done.stdout, re.MULTILINE) == TARGETS
    phony = re.search(r"^\.PHONY: (.*)", MAKEFILE.replace("\\\n", ""), re.MULTILINE)
    assert phony is not None and phony[1].split() == TARGETS


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "clean"])
def test_targets_can_be_planned(target: str) -> None:
    done = run("make", "-n", target)
    assert done.returncode == 0, done.stderr


def test_what_make_starts_has_no_variable_that_tinygrad_takes_for_a_device(tmp_path: Path) -> None:
    probe = tmp_path / "probe.mk"
    probe.write_text(f"include {ROOT}/Makefile\nprobe:\n\t@env\n")
    for words in ((), ("PYTHON=/usr/bin/python3.12",)):
        found = dict(
            line.split("=", 1)
            for line in run("make", "-f", str(probe), "probe", *words).stdout.splitlines()
            if "=" in line
        )
        assert "PYTHON" not in found
        assert (
            found["SYSTEM_PYTHON"] == words[0][7:] if words else "python" in found["SYSTEM_PYTHON"]
        )


def test_the_budget_reaches_the_demo() -> None:
    assert "tools/demo.py --budget 60" in run("make", "-n", "demo", "BUDGET=60").stdout
    assert "tools/demo.py --budget 300" in run("make", "-n", "demo").stdout


def test_the_parts_of_the_demo_take_twenty_seconds_by_default() -> None:
    for part in ("train", "lora", "qlora"):
        found = run("make", "-n", f"llama-demo-{part}").stdout
        assert f"tools/demo_llama.py {part} --budget 20" in found
    found = run("make", "-n", "llama-ci", "BUDGET=5").stdout
    assert re.findall(r"demo_llama.py (\w+) --budget 5", found) == ["train", "lora", "qlora"]


def test_files_of_tests_exist() -> None:
    files = re.findall(r"tests/[\w/]+\.py", MAKEFILE)
    assert len(files) > 10 and [file for file in files if not (ROOT / file).exists()] == []


def test_developers_get_a_real_tokenizer_without_its_dependencies() -> None:
    for kind, expected in (("dev", True), ("demo", False)):
        planned = run("make", "-n", "-B", f".venv/.{kind}").stdout
        assert f"--editable '.[{kind}]'" in planned
        shell = [line for line in planned.splitlines() if "--no-deps" in line]
        assert ("if [ dev = dev ]" in "".join(shell)) == expected


def test_slow_tests_exist() -> None:
    for line in (ROOT / "tests" / "slow.txt").read_text().split():
        file, _, name = line.partition("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in text, line


def ci_in(
    folder: Path, bare: Path, make: str, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run .ci/run in a folder where `make` is the shell script given, with these variables set."""
    for name in (".ci", "tools"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci")
    command(folder / "tools", "system.sh", f'echo "system.sh $*" >> {folder}/commands')
    command(bare, "make", f'echo "make $*" >> {folder}/commands\n{make}')
    return subprocess.run(
        [folder / ".ci" / "run"], env={"PATH": str(bare), **variables},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_ci_runs_tests_lint_quality_a_minute_of_fuzzing_and_one_of_the_demo(
    bare: Path, tmp_path: Path
) -> None:
    done = ci_in(tmp_path / "clone", bare, "true")
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "clone" / "commands").read_text().splitlines()
    assert commands[0].startswith("system.sh --required ")
    targets = ["test", "lint", "quality-quick", "fuzz SEED=1", "demo BUDGET=60"]
    assert commands[1:] == [f"make {target}" for target in targets]


def test_ci_stops_at_the_first_failure_with_its_exit_code(bare: Path, tmp_path: Path) -> None:
    assert ci_in(tmp_path / "clone", bare, "exit 3").returncode == 3
    assert (tmp_path / "clone" / "commands").read_text().count("make") == 1


def test_no_variable_of_a_developer_reaches_what_ci_runs(bare: Path, tmp_path: Path) -> None:
    """Only what finds programs and the network does; HOME is a new, empty folder, later removed."""
    kept = {"LANG": "C.UTF-8", "CI": "true", "HTTPS_PROXY": "http://a b", "no_proxy": "*"}
    kept |= {"PIP_INDEX_URL": "http://index", "SSL_CERT_FILE": "/cert"}
    dropped = {"PYTHONUNBUFFERED": "1", "VIRTUAL_ENV": "/venv", "MAKEFLAGS": "-k", "DEV": "CPU"}
    home = tmp_path / "home"
    seen = tmp_path / "seen"
    files = 'shopt -s nullglob dotglob; cd "$HOME"; echo files: *'
    look = f"env > {seen}; ({files}) >> {seen}"
    done = ci_in(tmp_path / "clone", bare, look, **kept, **dropped, HOME=str(home))
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^(\w+)=(.*)$", seen.read_text(), re.MULTILINE))
    empty_home = Path(found.pop("HOME"))
    assert empty_home != home and not empty_home.exists()
    assert seen.read_text().endswith("\nfiles:\n")
    for of_bash in ("PWD", "OLDPWD", "SHLVL", "_"):
        found.pop(of_bash, None)
    assert found == {"PATH": str(bare), **kept}


def test_a_missing_compiler_ends_with_what_to_type(bare: Path) -> None:
    done = run("tools/system.sh", "clang", path=bare)
    assert done.returncode == 1
    assert "tinygrad's CPU backend needs the C compiler clang" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_tests_can_do_without_is_named_but_not_required(bare: Path) -> None:
    command(bare, "clang", "[ $1 = --version ]")  # answers, but has no sanitizers' library
    done = run("tools/system.sh", "clang", "sanitizers", path=bare)
    assert done.returncode == 0, done.stderr
    assert "the kernels' sanitizer tests need clang's runtime library: type" in done.stderr
    assert run("tools/system.sh", "--required", "sanitizers", path=bare).returncode == 1


def test_git_is_needed_by_one_test_and_by_ci(bare: Path) -> None:
    done = run("tools/system.sh", "git", path=bare)
    assert done.returncode == 0
    assert done.stderr.startswith("the test of README's commands needs git: type  sudo apt-get")
    assert run("tools/system.sh", "--required", "git", path=bare).returncode == 1
    command(bare, "git", "true")
    done = run("tools/system.sh", "--required", "git", path=bare)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_clang_with_its_version_in_its_name_is_enough(bare: Path, tmp_path: Path) -> None:
    command(bare, "clang-15", "echo clang version 15")
    done = run("tools/system.sh", "clang", path=bare, venv=str(tmp_path / "venv"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "venv" / "bin" / "clang").resolve() == (bare / "clang-15").resolve()


@pytest.mark.skipif(os.getuid() != 0, reason="root alone calls apt-get without sudo")
def test_apt_get_installs_what_is_missing(bare: Path) -> None:
    installed = f"printf '#!/usr/bin/env bash\\n' > {bare}/clang; /bin/chmod +x {bare}/clang"
    command(bare, "apt-get", f'echo "$@" >> {bare}/log; case "$*" in *install*) {installed};; esac')
    done = run("tools/system.sh", "clang", path=bare)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Installing clang with apt-get ...\n"
    update, install = (bare / "log").read_text().splitlines()
    assert update.endswith(" update")
    assert install.endswith(" install -y --no-install-recommends clang")


def test_unknown_needs_are_refused() -> None:
    done = run("tools/system.sh", "gcc")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: tools/system.sh")
