"""The layers of the package: which imports are allowed, and who may use tinygrad's inside."""

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
    "tinyllama __main__ evaluate backends lm_eval",
)
LEVEL = {name: level for level, line in enumerate(LAYERS) for name in line.split()}
# `python -m tinyllama.train` is a door to the command line, as are the files of the last layer.
DOORS = ("train.__main__", "generate.__main__", "bench.__main__")

# Only runtime/ and ops/ use tinygrad's inside, because it changes with every version.
INTERNALS = ("codegen", "engine", "function", "renderer", "runtime", "schedule", "uop")
# tinygrad keeps the number of threads as a limit of its C renderer, and has bindings of drivers.
MAY_KNOW = {
    ("system.device", "tinygrad.renderer.cstyle"),
    ("system.gpu_driver", "tinygrad.runtime.autogen"),
    ("system.bindings", "tinygrad.runtime.autogen"),
}
# Attributes of tensors, captured steps and buffers that belong to tinygrad's inside.
INSIDE = {"uop", "captured", "jit_cache", "lazydata", "_buf", "_bufs", "va_addr"}
INSIDE |= {"custom_kernel", "linear_with_vars", "schedule_linear", "has_buffer_identity"}
# An open device gives access to its allocator, compiler, runtime and graph. These two files need
# its name and its free memory.
MAY_OPEN_DEVICES = ("system.device", "system.memory")
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


def chains(module: str, tree: ast.Module) -> list[str]:
    """Expressions of `module` that reach into tinygrad's objects without being allowed to."""
    if package_of(module) in ("runtime", "ops"):
        return []
    imported = tinygrad_names(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            private = node.attr.startswith("_") and ast.unparse(node.value) in imported
            if node.attr in INSIDE or private or ast.unparse(node) == "Device.default":
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Device"):
            if module not in MAY_OPEN_DEVICES:
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and name.value in INSIDE:
                found.append(ast.unparse(node))
    return found


def tinygrad_names(tree: ast.Module) -> set[str]:
    """The names of what a file imports of tinygrad, and of the devices that it opens."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            whole = "" if isinstance(node, ast.Import) else f"{node.module}."
            for alias in node.names:
                if f"{whole}{alias.name}.".startswith("tinygrad."):
                    names.add(alias.asname or alias.name)
        elif isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Device["):
            names |= {ast.unparse(target) for target in node.targets}
    return names


def changes(tree: ast.Module) -> list[str]:
    """Attributes of tinygrad that a file assigns to."""
    names = tinygrad_names(tree)
    for node in ast.walk(tree):  # for module in (jit, schedule): ...
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            if {ast.unparse(element) for element in node.iter.elts} & names:
                names.add(ast.unparse(node.target))
    found = []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            targets = [ast.Attribute(node.args[0], ast.unparse(node.args[1]))]
        for target in targets:
            words = ast.unparse(target)
            if isinstance(target, ast.Attribute) and (
                words.startswith("Device[") or any(words.startswith(f"{name}.") for name in names)
            ):
                found.append(words)
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


@pytest.mark.parametrize("module", MODULES)
def test_only_runtime_and_operations_reach_into_tinygrads_objects(module: str) -> None:
    assert chains(module, parsed(module)) == []


@pytest.mark.parametrize(
    "chain",
    [
        "tensor.uop",
        "tensor.uop.base.buffer",
        "self.step._whole.captured.linear.src",
        "Device['CPU'].runtime",
        "Device[Device.DEFAULT].compiler",
        "tinygrad.Device['CPU'].graph",
        "Device['CPU'].allocator.free_cache()",
        "Device.default.renderer",
        "Device._opened_devices",
        "buffer._buf.va_addr",
        "getattr(tensor, 'uop')",
        "Tensor.custom_kernel(tensor)",
    ],
)
def test_each_kind_of_chain_into_tinygrad_is_found(chain: str) -> None:
    tree = ast.parse(f"from tinygrad import Device, Tensor\ndef f(): return {chain}")
    assert chains("train.step", tree) != []
    assert chains("runtime.storage", tree) == []


def test_what_tinygrad_offers_to_everybody_is_no_chain() -> None:
    code = "from tinygrad import Device, Tensor\nTensor.empty(3).realize()\nDevice.DEFAULT\nself._x"
    assert chains("train.step", ast.parse(code)) == []


@pytest.mark.parametrize(
    "module", [m for m in MODULES if not m.startswith("runtime.patches.") and m != "system.device"]
)
def test_only_patches_change_tinygrad(module: str) -> None:
    assert changes(parsed(module)) == []


def test_each_kind_of_change_is_found() -> None:
    for line, found in (
        ("from tinygrad.engine import jit\njit.jit_lower = f", "jit.jit_lower"),
        ("import tinygrad.device as d\nd.Device.x += 1", "d.Device.x"),
        ("cpu = Device['CPU']\ncpu.graph = f", "cpu.graph"),
        ("Device['CPU'].graph = f", "Device['CPU'].graph"),
        ("from tinygrad import Tensor\nsetattr(Tensor, 'x', f)", "Tensor.'x'"),
        ("from tinygrad.engine import jit\nfor m in (jit, jit):\n  m.f = g", "m.f"),
    ):
        assert changes(ast.parse(line)) == [found], line
    assert changes(parsed("runtime.patches.layout")) == ["module.memory_plan_rewrite"]
    assert changes(ast.parse("from tinygrad import Tensor\nself.x = Tensor\nTensor_x.y = 1")) == []


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


# These print for people by themselves: the functions for all others, and the last line of a
# command, whose error is fit for a terminal already.
MAY_PRINT_TO_STDERR = ("system.notices", "cli.arguments", "cli.app", "reports.backends")


@pytest.mark.parametrize("module", MODULES)
def test_what_is_said_on_standard_error_is_fit_for_a_terminal(module: str) -> None:
    calls = [
        ast.unparse(node)
        for node in ast.walk(parsed(module))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "print"
        and any(key.arg == "file" and "stderr" in ast.unparse(key.value) for key in node.keywords)
    ]
    assert module in MAY_PRINT_TO_STDERR or package_of(module) == "bench" or calls == []
