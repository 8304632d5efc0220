"""Every change to how tinygrad behaves: one file each, all installed by `install`.

They are written for the version of tinygrad that `system.device.TINYGRAD` names; another version
is refused. TINYLLAMA_PATCHES_OFF=name,name switches patches off, back to tinygrad's own behaviour.
docs/tinygrad.md lists them for a reader.
"""

import functools

from tinyllama.errors import DeviceError
from tinyllama.runtime.patches import (
    bfloat16,
    cubin,
    deferred_llvm,
    free_steps,
    huge_pages,
    kernel_cache,
    kernel_sizes,
    layout,
    native_launch,
    opencl_graph,
    parallel_compilers,
    recording,
    uninterrupted_compilers,
    wait_when_lowered,
)
from tinyllama.runtime.patches.patch import Patch
from tinyllama.system import device

PATCHES: tuple[Patch, ...] = (
    bfloat16.PATCH,
    kernel_sizes.PATCH,
    deferred_llvm.PATCH,
    kernel_cache.PATCH,
    huge_pages.PATCH,
    layout.PATCH,
    native_launch.PATCH,
    cubin.PATCH,
    parallel_compilers.PATCH,
    opencl_graph.PATCH,
    free_steps.PATCH,
    wait_when_lowered.PATCH,
    uninterrupted_compilers.PATCH,
    recording.PATCH,
)


@functools.cache
def install() -> tuple[str, ...]:
    """Apply every patch that is not switched off, once; returns their names.

    Everything that makes a graph or asks for a tensor's memory calls this first. Raises
    DeviceError for another version of tinygrad, and where TINYLLAMA_PATCHES_OFF names a patch that
    does not exist or cannot be switched off.
    """
    device.check_tinygrad()
    off = _switched_off()
    installed = [patch for patch in PATCHES if patch.name not in off]
    for patch in installed:
        patch.apply()
    return tuple(patch.name for patch in installed)


def patch_table() -> str:
    """The patches as a Markdown table, for docs/tinygrad.md."""
    lines = ["| patch | what it does and why | replaces | switch | test |", "|---|---|---|---|---|"]
    for patch in PATCHES:
        replaces = ", ".join(f"`{name.removeprefix('tinygrad.')}`" for name in patch.replaces)
        off = f"`TINYLLAMA_PATCHES_OFF={patch.name}`"
        switch = f"none: without it {patch.needed}" if patch.needed else off
        test = patch.test.removeprefix("tests/").replace("::", " `") + "`"
        lines.append(f"| `{patch.name}` | {patch.why} | {replaces} | {switch} | {test} |")
    return "\n".join(lines)


def _switched_off() -> tuple[str, ...]:
    """The names in TINYLLAMA_PATCHES_OFF, checked."""
    off = device.patches_off()
    needed = {patch.name: patch.needed for patch in PATCHES}
    allowed = ", ".join(name for name in needed if not needed[name])
    for name in off:
        if name not in needed:
            raise DeviceError(
                f"TINYLLAMA_PATCHES_OFF: there is no patch {name!r}, must be one of {allowed}"
            )
        if needed[name]:
            raise DeviceError(
                f"TINYLLAMA_PATCHES_OFF: {name!r} cannot be switched off, since without it "
                f"{needed[name]}; those that can be are {allowed}"
            )
    return off
