"""Which lines of the model each kernel comes from, noted while `tracked` is on and only then.

tinygrad keeps metadata of the operations of a tensor, beside the graph and not in it. While lines
are tracked they name the lines of `model/`, or else of `train/`, that are on Python's stack when an
operation or a kernel of ours is made. A gradient gets the lines of what it is the gradient of.

tinygrad drops this metadata when it schedules. So each kernel of ours that goes into a schedule
carries a number, by which it is found again, and a kernel that tinygrad makes gets the lines of the
operations between the kernels of ours that surround it. Kernels are the same with and without.
"""

import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from tinygrad import Tensor
from tinygrad.helpers import Metadata
from tinygrad.tensor import _apply_map_to_tensors
from tinygrad.uop.ops import GroupOp, Ops, UOp, all_metadata

PACKAGE = Path(__file__).resolve().parents[1]
# Files of the layers that the model is built from: which of them it is, their caller says.
LAYERS = ("layers.py", "lora.py", "int4.py")
# Who may ask for an operation, in the order in which their lines are taken.
ASKING = ("model", "train", "generate")

_MODEL = f"{PACKAGE.name}/model/"

Lines = tuple[str, ...]  # "tinyllama/model/llama.py:60", the innermost first

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

_tracking = 0
_inherited: list[tuple[Metadata, ...]] = []  # of what an operation is being made for
_backward = 0  # within how many `gradients` we are
# By the identity of a call's information, which stays where a graph is rewritten.
_calls: dict[int, tuple[Any, tuple[Metadata, ...]]] = {}


def tracking() -> bool:
    """Whether lines are noted."""
    return _tracking > 0


@contextmanager
def tracked(noted_by: Callable[..., AbstractContextManager[None]]) -> Iterator[None]:
    """Note lines of what is built within; `noted_by` is that of patches/recording.py, which imports
    what imports this file."""
    global _tracking
    _tracking += 1
    try:
        with noted_by(_metadata):
            yield
    finally:
        _tracking -= 1
        if not _tracking:
            _calls.clear()


def stack_lines() -> Lines:
    """The lines on Python's stack that ask for an operation, the innermost first.

    Of the model these are the line in a layer's file and the line that calls the layer.
    """
    found: dict[str, list[str]] = {}
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        package = path.parent.name
        if package in ASKING and path.parent.parent == PACKAGE:
            lines = found.setdefault(package, [])
            if not lines or _is_of_a_layer(lines[-1]):
                lines.append(f"{PACKAGE.name}/{package}/{path.name}:{frame.f_lineno}")
        frame = frame.f_back
    return next((tuple(found[package]) for package in ASKING if package in found), ())


def _is_of_a_layer(line: str) -> bool:
    return line.rpartition("/")[2].partition(":")[0] in LAYERS


def plain_name(name: str) -> str:
    """A kernel's name without tinygrad's colours."""
    return _COLOURS.sub("", name)


def lines_of(metadata: Iterable[Metadata]) -> Lines:
    """The lines that metadata names, each once."""
    return tuple(dict.fromkeys(line for m in metadata for line in m.caller.split()))


def is_backward(metadata: Iterable[Metadata]) -> bool:
    """Whether all of it is of gradients."""
    parts = tuple(metadata)
    return bool(parts) and all(m.backward for m in parts)


def noted(results: Sequence[Tensor], name: str) -> None:
    """Note the lines of a kernel of ours, or of a function, that has just been made."""
    for result in results:
        for call in (u for u in result.uop.src if u.op in (Ops.CALL, Ops.FUNCTION)):
            _calls[id(call.arg)] = call.arg, (_metadata(name, ""),)
            all_metadata[call] = _calls[id(call.arg)][1]


@contextmanager
def made_for(call: UOp, *, backward: bool = False) -> Iterator[None]:
    """What is made within stands for a kernel or a function of ours, or is its gradient."""
    made = _metadata_of(call)
    _inherited.append(tuple(dataclasses.replace(m, backward=m.backward or backward) for m in made))
    try:
        yield
    finally:
        _inherited.pop()


@contextmanager
def gradients() -> Iterator[None]:
    """What is made within is part of the backward pass, though nothing is differentiated."""
    global _backward
    _backward += 1
    try:
        yield
    finally:
        _backward -= 1


def carried(old: Sequence[UOp], new: Sequence[UOp]) -> None:
    """Give `new`, which is `old` rewritten, the metadata of the operations they both have."""
    ahead, done = list(zip(old, new, strict=True)), set()
    while ahead:
        before, after = pair = ahead.pop()
        if before is after or pair in done or before.op is not after.op:
            continue
        done.add(pair)
        if before in all_metadata and after not in all_metadata:
            all_metadata[after] = all_metadata[before]
        ahead += zip(before.src, after.src, strict=False)


class Piece:
    """A piece of a step, from before it is scheduled until its kernels are known."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        """Number the kernels of ours that the outputs need."""
        self._roots = [tensor.uop for tensor in outputs]
        sink = UOp.sink(*self._roots)
        self._calls = [u for u in sink.toposort() if u.op is Ops.CALL]
        numbered = {
            call: call.replace(
                arg=dataclasses.replace(call.arg, metadata=(Metadata(f"{number}", ""),))
            )
            for number, call in enumerate(self._calls)
        }
        _apply_map_to_tensors(numbered, "numbers of calls")

    def attributed(self, kernels: UOp, outputs: Sequence[Tensor]) -> UOp:
        """`kernels` (LINEAR) with the metadata of each; `outputs` now have their buffers."""
        asked: dict[UOp, list[UOp]] = {}  # buffer -> what it stands for in the graph
        for tensor, root in zip(outputs, self._roots, strict=True):
            asked.setdefault(tensor.uop.base, []).append(root)
        attributed: list[UOp] = []
        for kernel in reversed(kernels.src):
            if kernel.arg.metadata:
                original = self._calls[int(kernel.arg.metadata[0].name)]
                metadata: Iterable[Metadata] = _metadata_of(original)
                for buffer, uop in zip(kernel.src[1:], original.src[1:], strict=True):
                    asked.setdefault(buffer, []).append(uop)
            else:
                written, read = _written_and_read(kernel)
                roots = [uop for buffer in written for uop in asked.get(buffer, ())]
                metadata = _region_metadata(roots)
                for buffer in read:
                    asked.setdefault(buffer, []).extend(roots)
            named = _of_the_model(metadata)
            attributed.append(kernel.replace(arg=dataclasses.replace(kernel.arg, metadata=named)))
        return kernels.replace(src=tuple(reversed(attributed)))


def _metadata_of(call: UOp) -> tuple[Metadata, ...]:
    """The metadata of a kernel or a function of ours."""
    _, metadata = _calls.get(id(call.arg), (None, ()))
    return metadata or all_metadata.get(call, ())


def _metadata(name: str, caller: str, backward: bool = False) -> Metadata:
    """tinygrad's metadata of an operation, whose caller is given in our lines."""
    backward = backward or _backward > 0
    if _inherited and _inherited[-1]:
        lines = lines_of(_inherited[-1])
        return Metadata(name, " ".join(lines), backward or is_backward(_inherited[-1]))
    return Metadata(name, " ".join(stack_lines()), backward)


def _written_and_read(kernel: UOp) -> tuple[list[UOp], list[UOp]]:
    """The buffers that a kernel of tinygrad's writes, and those that it reads."""
    buffers = list(kernel.src[1:])
    stores = [u for u in kernel.src[0].toposort() if u.op is Ops.STORE]
    places = {p.arg for s in stores for p in s.src[0].toposort() if p.op is Ops.PARAM}
    written = [buffer for place, buffer in enumerate(buffers) if place in places] or buffers[:1]
    return written, [buffer for buffer in buffers if buffer not in written]


def _region_metadata(roots: Iterable[UOp]) -> list[Metadata]:
    """The metadata of all operations that roots are made of, down to calls and memory."""
    found: list[Metadata] = []
    for root in roots:
        for uop in root.toposort(gate=lambda u: not _is_given(u)):
            if uop.op not in GroupOp.Movement:
                found += all_metadata.get(uop, ())
    return found


def _is_given(uop: UOp) -> bool:
    """Whether an operation gets this from memory, from a kernel of ours, as a number or shape."""
    if uop.op is Ops.AFTER:
        return uop.src[1].op is Ops.CALL
    return uop.op in (Ops.BUFFER, Ops.CALL, Ops.CONST, Ops.STACK)


def _of_the_model(metadata: Iterable[Metadata]) -> tuple[Metadata, ...]:
    """Metadata that names lines; those of the model alone if there are any."""
    named = dict.fromkeys(m for m in metadata if m.caller)
    return tuple(m for m in named if m.caller.startswith(_MODEL)) or tuple(named)
