"""The benchmark's result as a table for people."""

from collections.abc import Sequence
from typing import Any

from tinyllama.bench import machine

MEGA, GIGA = 1e6, 1e9


def text(result: dict[str, Any]) -> str:
    """The machine, the run, and a column for each contender."""
    run = result["run"]
    head = [
        machine.line(result["machine"]),
        f"device: {result['device']}, {result['device_name']}",
        f"{run['config']}: {result['parameters'] / MEGA:.1f} M parameters, "
        f"{run['batch']} x {run['context']} tokens per step, {run['dtype']}",
        f"data: {result['data']}",
        f"medians of {run['steps']} steps after {run['warm_up_steps']} to warm up, in turn",
        "",
    ]
    columns = [result] + ([result["peer"]] if "peer" in result else [])
    warning = machine.warning(result["machine"])
    lines = [warning, ""] if warning else []
    lines += table(["", *(c["library"] for c in columns)], _rows(columns))
    if "ratio" in result:
        lines += ["", f"tinyllama is {result['ratio']:.2f} times as fast as the peer"]
    if "memory_ratio" in result:
        lines += [f"and its peak memory is {result['memory_ratio']:.2f} of the peer's"]
    return "\n".join([*head, *lines])


def _rows(columns: Sequence[dict[str, Any]]) -> list[list[str]]:
    def row(title: str, key: str, form: str, scale: float = 1.0) -> list[str]:
        values = [c[key] for c in columns]
        return [title, *("" if v is None else format(v / scale, form) for v in values)]

    return [
        ["device", *(c["device"] for c in columns)],
        row("tokens per second", "tokens_per_second", ",.1f"),
        row("seconds per step", "step_seconds", ".4f"),
        row("  fastest", "step_seconds_min", ".4f"),
        row("  slowest", "step_seconds_max", ".4f"),
        row("seconds to the first loss", "first_loss_seconds", ".1f"),
        row("second step, seconds", "second_step_seconds", ".2f"),
        row("peak memory, GB", "peak_memory_bytes", ".3f", GIGA),
        row("GFLOPS by the model's formula", "flops_per_second", ".1f", GIGA),
        row("FLOPs executed / model's", "flops_ratio", ".3f"),
        row("kernels per step", "kernels_per_step", ",.0f"),
        row("first loss", "first_loss", ".4f"),
        row("last loss", "last_loss", ".4f"),
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns: the first to the left, numbers to the right."""
    every = [head, *rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    return [line(head), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, rows)]
