"""What goes where: results to standard output, everything else to standard error."""

from __future__ import annotations

import datetime as dt
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from service.units import format_bytes

#: No table is wider; long words are folded.
_MOST_COLUMNS = 100


def say(message: str) -> None:
    """Tell the person at the terminal something; never part of a result."""
    print(message, file=sys.stderr, flush=True)


def print_json(document: Any) -> None:
    """Print a result for programs."""
    print(json.dumps(document, indent=2, ensure_ascii=False), flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print a table for people; columns named in `right` hold numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name in columns:
        is_number = name in right
        table.add_column(name, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # As wide as it needs, whatever the terminal: a narrow one wraps lines.
    measure = Console(width=_MOST_COLUMNS).measure(table)
    Console(width=measure.maximum, highlight=False, soft_wrap=True).print(table)


def format_time(instant: str | None) -> str:
    """Return an instant of a document as people read it: local time, to the minute; `-` for none."""
    return "-" if instant is None else dt.datetime.fromisoformat(instant).astimezone().strftime("%Y-%m-%d %H:%M")


def format_error(error: Mapping[str, Any]) -> str:
    """Return an error document as one line: its code and its sentence."""
    return f"{error['code']}: {error['message']}"


def format_failure(state: str, error: Mapping[str, Any]) -> str:
    """Return why a variant did not succeed, as one line; of a refusal, the figures and thresholds that decided."""
    missed = error.get("details", {}).get("missed")
    if error["code"] != "gate_refused" or not missed:
        return f"{state}: {format_error(error)}"
    return f"{state}: {'; '.join(format_verdict(verdict) for verdict in missed)}"


def format_verdict(verdict: Mapping[str, Any]) -> str:
    """Return one gate, held against one figure: `max_kl: 0.034, at most 0.01`."""
    figure, threshold = (format_figure(verdict["figure_name"], verdict[name]) for name in ("figure", "threshold"))
    if figure == threshold and not verdict["passed"]:
        figure, threshold = f"{verdict['figure']:,.15g}", f"{verdict['threshold']:,.15g}"
    return f"{verdict['gate']}: {figure}, {verdict.get('bound', 'threshold').replace('_', ' ')} {threshold}"


def format_figure(name: str, figure: float | None) -> str:
    """Return a figure with the unit that its name carries."""
    if figure is None:
        return "not measured"
    if name.endswith("_bytes"):
        return format_bytes(figure)
    if name.endswith("_s") and not name.endswith("_per_s"):
        return f"{figure * 1000:,.3g} ms" if figure < 1 else f"{figure:,.3g} s"
    return f"{figure:,.0f}" if figure >= 1000 else f"{figure:.3g}"
