"""One or more runs as a page of HTML that needs no network and no other file.

    runs -> columns (base64 float32) + figures + sections (HTML) -> page/page.html

The charts are drawn by uPlot, whose two files lie in uplot/ as its npm package has them
(uplot 1.6.32, MIT licence, https://github.com/leeoniya/uPlot). Everything that comes from a run's
files is escaped.
"""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from tinyllama.config.options import to_toml
from tinyllama.reports.runs import Column, KeptOperation, Note, Run
from tinyllama.version import __version__

UPLOT_VERSION = "1.6.32"
_HERE = Path(__file__).parent
_MOST_ROWS = 200  # of a table
_MOST_SAMPLES = 40
_MOST_CHARACTERS = 20_000  # of a sample
_MOST_LINES = 6  # of the model, that the roofline names per operation


class Line(NamedTuple):
    """One column as a line of a chart; `dots` is for values that few steps have."""

    column: str
    label: str
    smooth: bool = False
    dots: bool = False


class Chart(NamedTuple):
    """A chart: `counts` is the column whose values are its points, `marks` the series whose
    anomalies it shows; a `wide` one has a row of its own."""

    name: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    counts: str
    kind: str = "number"
    zero: bool = False
    marks: tuple[str, ...] = ()
    wide: bool = False


CHARTS = (
    Chart(
        "loss",
        "Loss",
        "nats per token",
        (Line("loss", "training", smooth=True), Line("val_loss", "validation", dots=True)),
        "loss",
        marks=("loss", "text"),
        wide=True,
    ),
    Chart(
        "val_loss",
        "Validation loss",
        "nats per token",
        (Line("val_loss", "validation"),),
        "val_loss",
    ),
    Chart("lr", "Learning rate", "rate", (Line("lr", "rate"),), "lr", zero=True),
    Chart(
        "grad_norm",
        "Gradient norm",
        "norm before clipping",
        (Line("grad_norm", "norm", smooth=True),),
        "grad_norm",
        zero=True,
        marks=("grad_norm",),
    ),
    Chart(
        "tokens_per_second",
        "Speed",
        "tokens per second",
        (Line("tokens_per_second", "speed", smooth=True),),
        "tokens_per_second",
        zero=True,
        marks=("step_seconds", "data_seconds"),
    ),
    Chart(
        "memory_bytes",
        "Memory in use",
        "memory",
        (Line("memory_bytes", "memory"),),
        "memory_bytes",
        "bytes",
        zero=True,
        marks=("memory_bytes",),
    ),
)

# Its points are operations of a profile, not steps.
ROOFLINE = Chart("roofline", "Roofline", "what the operations reach", (), "", wide=True)


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """The charts that these runs have values for, and the main ones in any case."""
    layers = list(dict.fromkeys(layer for run in runs for layer in run.layers))
    found = [
        chart
        for chart in CHARTS
        if chart.name != "val_loss" or any(_points(run.columns["val_loss"]) for run in runs)
    ]
    if layers:
        lines = tuple(Line(f"ratio {layer}", layer) for layer in layers)
        found.append(
            Chart(
                "update_ratios",
                "Updates",
                "update / weights",
                lines,
                lines[0].column,
                marks=("update", *(f"update_ratio of {layer}" for layer in layers)),
            )
        )
    if any(run.roofline_points for run in runs):
        found.append(ROOFLINE)
    return found


def page(runs: Sequence[Run], *, live: bool = False, words: Iterable[str] = ()) -> str:
    """The whole page; `words` are lines about what stands out, `live` lets it ask for more."""
    heading = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = {
        "title": html.escape(f"{heading} · tinyllama"),
        "heading": html.escape(heading),
        "charts": "\n".join(elements(runs).values()),
        "sections": sections(runs, words),
        "version": __version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "uplot_version": UPLOT_VERSION,
        "data": embedded(data(runs, live=live)),
        "css": _part("page/page.css"),
        "uplot_css": _part("uplot/uPlot.min.css"),
        "uplot_js": _part("uplot/uPlot.iife.min.js"),
        "js": _part("page/page.js"),
    }
    first, *rest = _part("page/page.html").split("{{")
    pieces = [first]
    for piece in rest:  # in one pass: what is put in is not looked at again
        name, _, text = piece.partition("}}")
        pieces += [parts[name], text]
    return "".join(pieces)


def data(runs: Sequence[Run], *, live: bool = False) -> dict[str, Any]:
    """What the page's script draws. Of a `live` page, `revision` changes when anything does, and
    `details` when what stands below the charts does."""
    content: dict[str, Any] = {
        "live": live,
        "charts": [chart._asdict() | _lines(chart) for chart in charts_of(runs)],
        "runs": [_run(run) for run in runs],
    }
    if not live:
        return content
    content["details"] = _digest(sections(runs))
    return content | {"revision": _digest(json.dumps(content, sort_keys=True))}


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def elements(runs: Sequence[Run]) -> dict[str, str]:
    """The HTML of each chart, before it is drawn, by its name."""
    return {chart.name: _chart_element(chart, runs) for chart in charts_of(runs)}


def embedded(content: Mapping[str, Any]) -> str:
    """JSON that no HTML parser takes for the end of its script element."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def sections(runs: Sequence[Run], words: Iterable[str] = ()) -> str:
    """What stands below the charts."""
    blocks = [
        _anomalies(runs),
        _words(list(words)),
        _samples(runs),
        *(_profile(run) for run in runs if run.profile),
        _configuration(runs),
        _machines(runs),
    ]
    return "\n".join(block for block in blocks if block)


def _part(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _lines(chart: Chart) -> dict[str, Any]:
    return {"lines": [line._asdict() for line in chart.lines]}


def _chart_element(chart: Chart, runs: Sequence[Run]) -> str:
    kind = "card chart wide" if chart.wide else "card chart"
    is_said = chart.unit in chart.title.lower()
    unit = "" if is_said else f"<small>{chart.unit}</small>"
    log = '<button type="button" class="log" aria-pressed="false">log</button>'
    return (
        f'<article class="{kind}" data-chart="{chart.name}" data-points="{_drawn(chart, runs)}">'
        f"<header><h2>{chart.title}{unit}</h2>"
        f'<small class="marks"></small>{log if chart.lines else ""}</header>'
        f'<div class="plot" role="img" aria-label="{chart.title}, {chart.unit}"></div></article>'
    )


def _drawn(chart: Chart, runs: Sequence[Run]) -> int:
    """How many points a chart has."""
    if chart is ROOFLINE:
        return sum(len(run.roofline_points) for run in runs)
    columns = [run.columns.get(line.column) for run in runs for line in chart.lines]
    if len(chart.lines) <= 2:
        columns = [run.columns.get(chart.counts) for run in runs]
    return sum(_points(column) for column in columns if column is not None)


def _points(column: Column) -> int:
    return int(np.count_nonzero(~np.isnan(column)))


def _packed(column: Column) -> str:
    return base64.b64encode(column.astype("<f4").tobytes()).decode()


def _run(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "columns": {name: _packed(column) for name, column in run.columns.items()},
        "anomalies": [
            {"step": note.step, "series": note.series, "what": _what(note)}
            for note in run.anomalies
        ],
        "checkpoints": [{"step": step, "name": name} for step, name in run.checkpoints],
        "summary": _summary(run),
        "roofline": _roofline(run),
    }


def _roofline(run: Run) -> dict[str, Any] | None:
    """What the roofline draws of a run: operations by intensity and speed, and the ceilings."""
    if not run.roofline_points:
        return None
    points = [
        {
            "name": point.name,
            "x": point.intensity,
            "y": point.gflops,
            "share": point.share,
            "source": point.source[:_MOST_LINES],
            "backward": point.name.endswith("(backward)"),
        }
        for point in run.roofline_points
    ]
    return {"points": points, "ceilings": run.ceilings and msgspec.to_builtins(run.ceilings)}


def _summary(run: Run) -> list[tuple[str, float | str | None, str]]:
    """The figures beside a run's name: name, value, kind."""
    c = run.columns
    figures: list[tuple[str, float | str | None, str]] = [
        ("steps", _last(c["step"]), "number"),
        ("training loss", _last_average(c["loss"]), "number"),
        ("validation loss", _last(c["val_loss"]), "number"),
        ("tokens", _last(c["tokens"]), "number"),
        ("time in steps", _last(c["seconds"]), "clock"),
        ("tokens/s", _median(c["tokens_per_second"]), "number"),
        ("most memory", _greatest(c["memory_bytes"]), "bytes"),
        ("anomalies", float(len(run.anomalies)), "number"),
    ]
    return figures  # also those that are not known: runs stand below each other


def _finite(column: Column) -> Column:
    return column[np.isfinite(column)]


def _last(column: Column) -> float | None:
    values = _finite(column)
    return float(values[-1]) if len(values) else None


def _last_average(column: Column) -> float | None:
    values = _finite(column)[-50:]
    return float(values.mean()) if len(values) else None


def _median(column: Column) -> float | None:
    values = _finite(column)
    return float(np.median(values)) if len(values) else None


def _greatest(column: Column) -> float | None:
    values = _finite(column)
    return float(values.max()) if len(values) else None


def card(title: str, body: str, *, wide: bool = False) -> str:
    """A box with a heading; `body` is HTML."""
    kind = "card wide" if wide else "card"
    return f'<section class="{kind}"><h2>{html.escape(title)}</h2>{body}</section>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of cells, which are HTML; `numbers` are the columns on the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if i in numbers else ''}>{cell}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{line(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _anomalies(runs: Sequence[Run]) -> str:
    several = len(runs) > 1
    rows = [
        [
            *([html.escape(run.name)] if several else []),
            f"{note.step:,}",
            f'<span class="tag bad">{html.escape(note.kind)}</span>',
            html.escape(_what(note)),
            html.escape(", ".join(note.documents)),
            html.escape(note.action),
        ]
        for run in runs
        for note in run.anomalies[:_MOST_ROWS]
    ]
    back = [
        f"<p>went back from step {r.origin:,} to {r.target:,}: "
        f"{html.escape('; '.join(map(_what, r.anomalies)))}</p>"
        for run in runs
        for r in run.rollbacks[:_MOST_ROWS]
    ]
    if not rows and not back:
        return card("Anomalies", '<p class="empty">none found</p>')
    head = [*(["run"] if several else []), "step", "kind", "what", "text of the batch", "action"]
    count = sum(len(run.anomalies) for run in runs)
    more = f"<p>and {count - _MOST_ROWS:,} more</p>" if count > _MOST_ROWS else ""
    body = table(head, rows[:_MOST_ROWS], (int(several),)) if rows else ""
    return card("Anomalies", "".join(back) + body + more, wide=bool(rows))


def _escaped(text: str) -> str:
    """Text from a file as HTML, of bounded length."""
    cut = text[:_MOST_CHARACTERS]
    return html.escape(cut if len(cut) == len(text) else f"{cut}...")


def _what(note: Note) -> str:
    value = "not finite" if note.value is None else _amount(note.series, note.value)
    usual = "" if note.usual is None else f", the usual is {_amount(note.series, note.usual)}"
    layer = f", most of all in {note.layer}" if note.layer else ""
    return f"{note.series} {value}{usual}{layer}"


def _amount(series: str, value: float) -> str:
    """A value of a series with its unit."""
    if series.endswith("_bytes"):
        return f"{value / 2**20:,.0f} MiB"
    unit = {"text": " nats per character"}.get(series, " s" if series.endswith("_seconds") else "")
    return f"{value:.4g}{unit}"


def _words(lines: list[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return card("What stands out", f'<ul class="words">{items}</ul>')


def _samples(runs: Sequence[Run]) -> str:
    blocks = []
    for run in runs:
        for sample in reversed(run.samples[-_MOST_SAMPLES:]):
            prompt, text = _escaped(sample.prompt), _escaped(sample.text)
            if text.startswith(prompt):
                text = f"<b>{prompt}</b>{text[len(prompt) :]}"
            name = f"{html.escape(run.name)}, " if len(runs) > 1 else ""
            blocks.append(
                f'<div class="sample"><small>{name}step {sample.step:,}</small>'
                f"<pre>{text}</pre></div>"
            )
    if not blocks:
        return ""
    body = f'<div class="scroll">{"".join(blocks)}</div>'
    return card("Samples, newest first", body)


def _configuration(runs: Sequence[Run]) -> str:
    keys = [key for key in dict.fromkeys(k for run in runs for k in run.config) if "." in key]
    if not keys:
        return ""
    rows: list[str] = []
    same: list[str] = []
    for key in keys:
        values = [_shown(run.config.get(key)) for run in runs]
        cells = [f"<td><code>{html.escape(key)}</code></td>"]
        cells += [f'<td class="code">{html.escape(value)}</td>' for value in values]
        differs = len(set(values)) > 1
        row = f"<tr{' class=differs' if differs else ''}>{''.join(cells)}</tr>"
        (rows if differs else same).append(row)
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    begin = f'<div class="scroll"><table><thead><tr><th>option</th>{head}</tr></thead><tbody>'
    end = "</tbody></table></div>"
    if len(runs) == 1:
        return card("Configuration", begin + "".join(same) + end)
    differing = begin + "".join(rows) + end if rows else '<p class="empty">no difference</p>'
    others = f"<details><summary>{len(same)} options are the same</summary>{begin}{''.join(same)}"
    return card("Configuration: what differs", f"{differing}{others}{end}</details>", wide=True)


def _shown(value: object) -> str:
    return "not set" if value is None else to_toml(value)


def _machines(runs: Sequence[Run]) -> str:
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.machine):
        values = [str(run.machine.get(key, "")) for run in runs]
        rows.append([html.escape(key.replace("_", " ")), *map(html.escape, values)])
    head = ["", *(html.escape(run.name) for run in runs)]
    return card("Machine", table(head, rows)) if rows else ""


def _profile(run: Run) -> str:
    """The table of a profile: `tinyllama profile` writes it beside a run."""
    if run.profile is None:
        return ""
    rows = []
    for operation in run.profile.operations[:_MOST_ROWS]:
        share = min(max(operation.share, 0.0), 1.0)
        bar = f'<i class="share" style="width:{100 * share:.1f}px"></i>'
        is_kernel = operation.calls > 0
        rows.append(
            [
                f"<code>{html.escape(operation.name)}</code>",
                _lines_of(operation),
                f"{bar} {100 * operation.share:.1f} %",
                f"{operation.calls:,.0f}" if is_kernel else "",
                f"{1000 * operation.seconds:.2f}",
                f"{operation.gflops:,.1f}" if operation.gflops else "",
                f"{operation.gb_per_second:,.1f}" if operation.gb_per_second else "",
            ]
        )
    head = ["operation", "source", "share", "calls", "ms", "GFLOPS", "GB/s"]
    return card(
        f"Where a step's {1000 * run.profile.step_seconds:.1f} ms go: {run.name}",
        f'<div class="hot">{table(head, rows, (2, 3, 4, 5, 6))}</div>',
        wide=True,
    )


def _lines_of(operation: KeptOperation) -> str:
    """The lines of an operation, as many as a row has room for."""
    shown = [html.escape(line) for line in operation.source[:_MOST_LINES]]
    more = len(operation.source) - len(shown)
    return "<br>".join([*shown, f"and {more} more"] if more else shown)
