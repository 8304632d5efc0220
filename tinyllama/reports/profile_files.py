"""A profile as files that other programs open.

- trace.json: Perfetto and chrome://tracing ("Trace Event Format", Google, 2016)
- profile.speedscope.json: a flame graph in speedscope (its file-format-schema.json)
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyllama.reports.profile import DATA, Measured, Profile
from tinyllama.runtime.timing import Kernel
from tinyllama.version import __version__

_PROCESS, _HOST, _DEVICE = 1, 1, 2  # numbers of the process and of its tracks
_THREADS = 10  # the first of the tracks of the device's threads


def write_trace(profile: Profile, file: Path) -> None:
    """Write every run of every kernel, and the parts of each step, on a time line."""
    start = profile.steps[0].begin
    events = [_name("process_name", f"tinyllama: {profile.what}", 0)]
    events += [_name("thread_name", "steps", _HOST), _name("thread_name", "kernels", _DEVICE)]
    threads = {part.thread for step in profile.steps for r in step.runs for part in r.parts}
    events += [_name("thread_name", f"thread {n}", _THREADS + n) for n in sorted(threads)]
    for number, step in enumerate(profile.steps, 1):
        events += _step_events(number, step, start)
    file.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")


def _step_events(number: int, step: Measured, start: float) -> Iterator[dict[str, Any]]:
    yield _slice(f"step {number}", _HOST, step.begin - start, step.end - start)
    yield _slice(DATA, _HOST, step.begin - start, step.data_end - start)
    for run in step.runs:
        kernel, seconds = run.kernel, run.end - run.begin
        arguments = {
            "source": ", ".join(kernel.lines),
            "pass": "backward" if kernel.is_backward else "forward",
            "gflops": kernel.flops / seconds / 1e9 if seconds else 0.0,
            "gb_per_second": kernel.nbytes / seconds / 1e9 if seconds else 0.0,
        }
        yield _slice(kernel.name, _DEVICE, run.begin - start, run.end - start, arguments)
        for part in run.parts:
            track = _THREADS + part.thread
            yield _slice(kernel.name, track, part.begin - start, part.end - start)


def _slice(
    name: str, track: int, begin: float, end: float, arguments: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A span of time; the format counts in microseconds."""
    event = {"ph": "X", "name": name, "cat": "step", "pid": _PROCESS, "tid": track}
    event |= {"ts": round(1e6 * begin, 3), "dur": round(1e6 * (end - begin), 3)}
    return event if arguments is None else {**event, "args": arguments}


def _name(what: str, name: str, track: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": _PROCESS, "tid": track, "args": {"name": name}}


def write_speedscope(profile: Profile, file: Path) -> None:
    """Write a flame graph: step, the lines that asked, kernel; the width is time."""
    frames: dict[tuple[str, str, int], int] = {}

    def frame(name: str, path: str = "", line: int = 0) -> int:
        return frames.setdefault((name, path, line), len(frames))

    samples: list[list[int]] = []
    weights: list[float] = []
    for step in profile.steps:
        root = frame("step")
        for run in step.runs:
            samples.append([root, *_stack(run.kernel, frame)])
            weights.append(run.end - run.begin)
        for name, seconds in step.rest().items():
            samples.append([root, frame(name)])
            weights.append(seconds)
    shown = [
        {"name": name} | ({"file": path, "line": line} if path else {})
        for name, path, line in frames
    ]
    flame = {
        "type": "sampled", "name": profile.what, "unit": "seconds", "startValue": 0,
        "endValue": sum(weights), "samples": samples, "weights": weights,
    }  # fmt: skip
    document = {
        "$schema": "https://www.speedscope.app/file-format-schema.json",
        "exporter": f"tinyllama {__version__}",
        "name": profile.what,
        "activeProfileIndex": 0,
        "shared": {"frames": shown},
        "profiles": [flame],
    }
    file.write_text(json.dumps(document) + "\n")


def _stack(kernel: Kernel, frame: Any) -> Iterator[int]:
    """The frames of a kernel, outermost first: its pass, the lines it comes from, itself."""
    yield frame("backward" if kernel.is_backward else "forward")
    for line in reversed(kernel.lines):
        path, _, number = line.rpartition(":")
        yield frame(line, path, int(number))
    yield frame(kernel.name)
