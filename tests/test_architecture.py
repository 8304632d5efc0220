"""The layout of the package: who may import whom, who may know what, how long things may be."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tinyllama"

# The layers, lowest first, in the way of the data. A file imports from the lines above its own
# and from nothing else. A new file gets its place here.
LAYERS = (
    "errors files driver processor schema signals ops weights bench",
    "command device manifest memory metrics parallel rows sections settings tokenizer",
    "config sources checkpoint ops.memory ops.layout ops.bfloat16",
    "corpus ops.storage ops.plan weights.dtypes",
    "data initialize ops.precompile weights.header weights.hf_config weights.hf_names",
    "ops.kernel ops.stage weights.safetensors weights.peft_config weights.int4",
    "ops.sums",
    "ops.matmul ops.attention ops.rope ops.rms_norm ops.swiglu ops.embedding ops.adamw ops.launch",
    "ops.cross_entropy ops.int4 weights.hf_read weights.hf_write",
    "layers optim weights.hf weights.peft",
    "model merge accounting",
    "gradients quantize",
    "step lora",
    "runs",
    "checks estimate evaluate generate start",
    "fit",
    "train",
    "bench.machine bench.operations bench.peer_peft bench.peer_torch bench.protocol bench.text",
    "bench.operations_torch bench.report bench.runner bench.worker_tinyllama bench.worker_torch",
    "bench.ops",
    "bench.__main__",
    "cli",
    "tinyllama __main__ backends",
)
LEVEL = {name: level for level, line in enumerate(LAYERS) for name in line.split()}

# How tinygrad works inside is for ops/ to know: these change with every version of it.
INTERNALS = ("codegen", "engine", "function", "renderer", "runtime", "schedule", "uop")
# The number of threads is a limit that tinygrad keeps in its C renderer; drivers are asked through
# its bindings.
MAY_KNOW = {("device", "tinygrad.renderer.cstyle"), ("driver", "tinygrad.runtime.autogen")}
ENVIRONMENT = {"environ", "environb", "getenv", "putenv", "unsetenv"}

FILE_LINES, FUNCTION_LINES = 300, 50
# Longer than a file should be, each for a reason.
LONG_FILES = {
    "tinyllama/ops/cpu/panels.h": "both factors in three layouts share every macro",
}


def module_of(path: Path) -> str:
    """Its name in LAYERS: tinyllama/ops/rope.py is ops.rope, a package has its folder's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts) or "tinyllama"


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def parsed(module: str) -> ast.Module:
    return tree_of(MODULES[module])


@functools.cache
def imports(tree: ast.Module) -> tuple[str, ...]:
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
    return tuple(names)


def own_module(name: str) -> str | None:
    """The file of ours that holds an imported name: tinyllama.ops.rope.tables is in ops.rope."""
    if name.split(".")[0] != "tinyllama":
        return None
    inner = name.removeprefix("tinyllama").removeprefix(".")
    while inner and inner not in MODULES:
        inner = inner.rpartition(".")[0]
    return inner or "tinyllama"


def wrong_imports(module: str, tree: ast.Module) -> list[str]:
    """Imports of `module` that do not come from a lower layer."""
    used = {own for name in imports(tree) if (own := own_module(name)) not in (None, module)}
    return sorted(str(own) for own in used if LEVEL.get(str(own), 0) >= LEVEL.get(module, 0))


def internals(module: str, tree: ast.Module) -> list[str]:
    """What `module` imports of tinygrad's inside without being allowed to."""
    if module.startswith("ops."):
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


def long_functions(tree: ast.Module) -> list[str]:
    """Functions of FUNCTION_LINES and more."""
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return [f.name for f in functions if (f.end_lineno or 0) - f.lineno + 1 >= FUNCTION_LINES]


def test_every_file_has_its_layer() -> None:
    assert sorted(LEVEL) == sorted(MODULES), "LAYERS names exactly the files that there are"


@pytest.mark.parametrize("module", MODULES)
def test_imports_come_from_lower_layers(module: str) -> None:
    assert wrong_imports(module, parsed(module)) == []


def test_an_import_from_the_same_or_a_higher_layer_is_found() -> None:
    tree = ast.parse("from tinyllama import model\nfrom tinyllama.ops.rope import rope\n")
    assert wrong_imports("ops.kernel", tree) == ["model", "ops.rope"]
    assert wrong_imports("model", tree) == []  # ops.rope is lower, and a file may name itself
    assert wrong_imports("ops.matmul", ast.parse("def f():\n  import tinyllama.ops.rope")) == [
        "ops.rope"
    ]


@pytest.mark.parametrize("module", MODULES)
def test_only_operations_know_the_inside_of_tinygrad(module: str) -> None:
    assert internals(module, parsed(module)) == []


def test_an_import_of_the_inside_of_tinygrad_is_found() -> None:
    tree = ast.parse("from tinygrad.uop.ops import UOp\nfrom tinygrad import Tensor\n")
    assert internals("model", tree) == ["tinygrad.uop.ops.UOp"]
    assert internals("ops.rope", tree) == []


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"device"}))
def test_only_device_reads_the_environment(module: str) -> None:
    assert environment_reads(parsed(module)) == []


def test_a_read_of_the_environment_is_found() -> None:
    for line in (
        "import os; os.environ['A']",
        "from os import getenv",
        "import os; os.getenv('A')",
    ):
        assert environment_reads(ast.parse(line)) == [1], line
    assert environment_reads(parsed("device")) != []


SOURCES = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.[ch]"), *(ROOT / "tools").glob("*.py")]


@pytest.mark.parametrize("path", sorted(str(p.relative_to(ROOT)) for p in SOURCES))
def test_files_and_functions_are_short(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    is_long = len(text.splitlines()) >= FILE_LINES
    assert is_long == (path in LONG_FILES), f"{path}: {len(text.splitlines())} lines"
    if path.endswith(".py"):
        assert long_functions(tree_of(ROOT / path)) == []


def test_a_long_function_is_found() -> None:
    body = "    x = 1\n" * (FUNCTION_LINES - 1)
    assert long_functions(ast.parse(f"def f():\n{body}")) == ["f"]
    assert long_functions(ast.parse(f"def f():\n{body}".removesuffix("    x = 1\n"))) == []
