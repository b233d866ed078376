"""What goes where: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

#: Wider than any table.
_UNLIMITED_COLUMNS = 10_000


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

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # As wide as it is: a narrow terminal wraps its lines, but no path is cut in pieces.
    measure = Console(width=_UNLIMITED_COLUMNS).measure(table)
    Console(width=measure.maximum, highlight=False, soft_wrap=True).print(table)


def format_bytes(size_bytes: float | None) -> str:
    """Return a size as people read it: `1.7 MB`."""
    if size_bytes is None:
        return "-"
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def format_error(error: dict[str, Any]) -> str:
    """Return an error document as one line: its code and its sentence."""
    return f"{error['code']}: {error['message']}"
