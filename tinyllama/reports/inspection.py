"""Rows of data for people: coloured in a terminal, or as one HTML file that needs nothing else."""

from collections.abc import Iterable, Sequence
from html import escape

from tinyllama.data.inspection import InspectedRow, Run, Totals

_TRAINED, _SPECIAL, _BOTH, _FAINT, _PLAIN = (
    "\033[32m",
    "\033[7m",
    "\033[7;32m",
    "\033[2m",
    "\033[0m",
)
_STYLE = """
:root { color-scheme: light dark; --trained: #b7e4c7; --ink: #1b4332; --line: #8886; }
@media (prefers-color-scheme: dark) { :root { --trained: #2d6a4f; --ink: #d8f3dc; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line);
      border-radius: 6px; padding: .8rem; }
.t { background: var(--trained); color: var(--ink); }
.s { outline: 1px solid currentColor; border-radius: 3px; font-size: .85em; padding: 0 2px; }
h2 { font-size: 1rem; margin: 2rem 0 .3rem; }
td, th { padding: .1rem .8rem .1rem 0; text-align: right; font-variant-numeric: tabular-nums; }
.bar { background: var(--ink); height: .8rem; min-width: 1px; }
"""


def terminal_row(row: InspectedRow, runs: Iterable[Run], colour: bool) -> str:
    """A row's place and its text. Without colours, what is trained is between \u27e6 and \u27e7."""
    title = f"{_place(row)}"
    if not colour:
        return f"{title}\n{_marked(runs)}\n"
    parts = [f"{_FAINT}{title}{_PLAIN}\n"]
    for text, trained, special in runs:
        begin = {(True, True): _BOTH, (True, False): _TRAINED, (False, True): _SPECIAL}
        code = begin.get((trained, special), "")
        parts.append(f"{code}{_safe(text)}{_PLAIN if code else ''}")
    return "".join([*parts, "\n"])


def terminal_totals(totals: Totals) -> str:
    """The counts and the histogram."""
    bars = totals.histogram()
    most = max((rows for *_, rows in bars), default=1)
    width = len(str(max((high for _, high, _ in bars), default=0)))
    lines = [_counts(totals), "tokens per row"]
    for low, high, rows in bars:
        bar = "\u2588" * -(-40 * rows // most)
        lines.append(f"{low:>{width}} to {high:>{width}}  {bar} {rows}")
    return "\n".join(lines)


def html_page(
    rows: Sequence[tuple[InspectedRow, Sequence[Run]]], totals: Totals, title: str
) -> str:
    """One page: counts, histogram, rows."""
    bars = totals.histogram()
    most = max((count for *_, count in bars), default=1)
    table = "".join(
        f"<tr><td>{low} to {high}</td><td>{count}</td><td style='width:20rem'>"
        f"<div class=bar style='width:{100 * count / most:.1f}%'></div></td></tr>\n"
        for low, high, count in bars
    )
    shown = "".join(
        f"<h2>{escape(_place(row))}</h2>\n<pre>{''.join(map(_html_run, runs))}</pre>\n"
        for row, runs in rows
    )
    return (
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{escape(title)}</title>\n"
        f"<meta name=viewport content='width=device-width'>\n<style>{_STYLE}</style>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(_counts(totals))}</p>\n"
        "<p><span class=t>trained</span> <span class=s>special token</span></p>\n"
        f"<table data-chart=lengths data-points={len(bars)}><tr><th>tokens</th><th>rows</th></tr>\n"
        f"{table}</table>\n{shown}</html>\n"
    )


def _place(row: InspectedRow) -> str:
    words = f"{row.file}, row {row.row}: {len(row.ids)} tokens, {sum(row.trained)} trained"
    if row.truncated:
        words += ", end cut off"
    return words if any(row.trained[1:]) else f"{words}: left out"


def _counts(totals: Totals) -> str:
    return (
        f"{totals.rows} rows, {totals.tokens} tokens, {totals.trained} trained; "
        f"{totals.truncated} rows cut off, {totals.dropped} left out (no token that is trained)"
    )


def _marked(runs: Iterable[Run]) -> str:
    parts, inside = [], False
    for text, trained, _ in runs:
        if trained != inside:
            parts.append("\u27e6" if trained else "\u27e7")
            inside = trained
        parts.append(_safe(text))
    return "".join([*parts, "\u27e7" * inside])


def _html_run(run: Run) -> str:
    classes = " ".join(["t"] * run.trained + ["s"] * run.special)
    return f"<span class='{classes}'>{escape(run.text)}</span>" if classes else escape(run.text)


def _safe(text: str) -> str:
    """Text whose control characters a terminal does not act on; line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
