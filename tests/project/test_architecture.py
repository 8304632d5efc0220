"""The layout of the package: who may import whom, and who may know what."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tinyllama"

# The layers, lowest first, in the way of the data. A package imports from the lines above its own,
# and its files from each other, but never in a circle.
LAYERS = (
    "errors version",
    "system",
    "config",
    "formats",
    "tokenizers",
    "data",
    "runtime",
    "ops",
    "model",
    "observe",
    "generate",
    "train",
    "convert",
    "reports",
    "bench",
    "cli",
    "tinyllama __main__ evaluate backends",
)
LEVEL = {name: level for level, line in enumerate(LAYERS) for name in line.split()}
# `python -m tinyllama.train` is a door to the command line, as are the files of the last layer.
DOORS = ("train.__main__", "generate.__main__", "bench.__main__")

# How tinygrad works inside is for runtime/ and ops/ to know: it changes with every version.
INTERNALS = ("codegen", "engine", "function", "renderer", "runtime", "schedule", "uop")
# The number of threads is a limit that tinygrad keeps in its C renderer; drivers are asked through
# its bindings.
MAY_KNOW = {
    ("system.device", "tinygrad.renderer.cstyle"),
    ("system.gpu_driver", "tinygrad.runtime.autogen"),
}
ENVIRONMENT = {"environ", "environb", "getenv", "putenv", "unsetenv"}


def module_of(path: Path) -> str:
    """A file's dotted name below tinyllama/: ops/rope.py is ops.rope."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts) or "tinyllama"


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def package_of(module: str) -> str:
    return module.partition(".")[0]


@functools.cache
def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> list[str]:
    """Absolute names of all that a file imports, wherever it does so.

    What stands under `if __name__ == "__main__"` or `if TYPE_CHECKING` is left out: the first is
    for `python -m`, the second for readers; neither happens on import.
    """
    names: list[str] = []
    left_out: set[int] = set()
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in (
            "__name__ == '__main__'",
            "TYPE_CHECKING",
        ):
            left_out |= {id(part) for part in ast.walk(node)}
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def own_module(name: str) -> str | None:
    """The file of ours that holds an imported name: tinyllama.ops.rope.tables is in ops.rope."""
    if name.split(".")[0] != "tinyllama":
        return None
    inner = name.removeprefix("tinyllama").removeprefix(".")
    while inner and inner not in MODULES:
        inner = inner.rpartition(".")[0]
    return inner or "tinyllama"


def own_imports(module: str, tree: ast.Module) -> set[str]:
    """The files of ours that a file imports."""
    return {own for name in imports(tree) if (own := own_module(name)) and own != module}


def wrong_imports(module: str, tree: ast.Module) -> list[str]:
    """Imports of `module` from a layer that is not below its own package's."""
    mine = LEVEL["cli" if module in DOORS else package_of(module)]
    return sorted(
        own
        for own in own_imports(module, tree)
        if package_of(own) != package_of(module)
        and LEVEL[package_of(own)] >= mine
        and not (module in DOORS and own == "cli.app")
    )


def circles(edges: dict[str, set[str]]) -> list[str]:
    """The files that import themselves by way of others."""

    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        ahead = [*edges[start]]
        while ahead:
            module = ahead.pop()
            if module not in found:
                found.add(module)
                ahead += edges.get(module, ())
        return found

    return [module for module in edges if module in reachable(module)]


def internals(module: str, tree: ast.Module) -> list[str]:
    """What `module` imports of tinygrad's inside without being allowed to."""
    if package_of(module) in ("runtime", "ops"):
        return []
    found = []
    for name in imports(tree):
        parts = name.split(".")
        allowed = any(module == m and name.startswith(prefix) for m, prefix in MAY_KNOW)
        if parts[0] == "tinygrad" and parts[1:2] and parts[1] in INTERNALS and not allowed:
            found.append(name)
    return found


def environment_reads(tree: ast.Module) -> list[int]:
    """Lines that reach for the environment, through os or through tinygrad's helpers."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT:
            lines.append(node.lineno)
        elif isinstance(node, ast.ImportFrom):
            lines += [node.lineno for alias in node.names if alias.name in ENVIRONMENT]
    return lines


def test_every_package_has_its_layer() -> None:
    assert set(LEVEL) == {package_of(module) for module in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_imports_come_from_lower_layers(module: str) -> None:
    assert wrong_imports(module, parsed(module)) == []


def test_an_import_from_a_higher_layer_is_found() -> None:
    tree = ast.parse("from tinyllama.model import llama\nfrom tinyllama.runtime import kernel\n")
    assert wrong_imports("ops.matmul", tree) == ["model.llama"]
    assert wrong_imports("train.step", tree) == []
    inside = ast.parse("def f():\n  import tinyllama.ops.rope")
    assert wrong_imports("runtime.kernel", inside) == ["ops.rope"]


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert circles({module: own_imports(module, parsed(module)) for module in MODULES}) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


@pytest.mark.parametrize("module", MODULES)
def test_only_runtime_and_operations_know_the_inside_of_tinygrad(module: str) -> None:
    assert internals(module, parsed(module)) == []


def test_an_import_of_the_inside_of_tinygrad_is_found() -> None:
    tree = ast.parse("from tinygrad.uop.ops import UOp\nfrom tinygrad import Tensor\n")
    assert internals("model.llama", tree) == ["tinygrad.uop.ops.UOp"]
    assert internals("ops.rope", tree) == []


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"system.device"}))
def test_only_device_reads_the_environment(module: str) -> None:
    assert environment_reads(parsed(module)) == []


def test_a_read_of_the_environment_is_found() -> None:
    for line in (
        "import os; os.environ['A']",
        "from os import getenv",
        "import os; os.getenv('A')",
    ):
        assert environment_reads(ast.parse(line)) == [1], line
    assert environment_reads(parsed("system.device")) != []
