"""The per-op profile that `benchmark_model --enable_op_profiling=true` prints, as tables. Pure.

Columns come by the names that the report gives them: versions differ in which there are, and in tabs or blanks between
them. A profile counts only whole, as every report. Called by `workers.devices.phone`.
"""

from __future__ import annotations

import math
import re
from typing import Any

from service.errors import ToolReportInvalid

_SECTION = "Operator-wise Profiling Info for Regular Benchmark Runs:"
#: What a table is of, where there is more than the one graph.
_OWNER = re.compile(r"^(?:INFO: )?(Primary graph|Subgraph|Delegate internal)(?: \((.*)\))?:\s*$")
_TITLE = re.compile(r"={10,} (.+?) ={10,}")
_NODES = re.compile(r"Number of nodes executed: (\d+)")
_SEPARATOR = re.compile(r"\t\s*|\s{2,}")
#: Nodes that are kept of each graph, the slowest first; there may be thousands.
_MOST_NODES = 50


def parse_profile(text: str) -> list[dict[str, Any]]:
    """Return a profile for each graph that ran: the signature's own, subgraphs, and what a delegate did inside.

    Each has `graph`, `nodes_executed`, `by_type` (`node_type`, `count`, `avg_ms`, `share`, `times_called`; the most
    expensive first) and `slowest` (`node_type`, `name`, `avg_ms`, `share`, `times_called`). `share` is of 1.
    """
    _, found, section = text.partition(_SECTION)
    if not found:
        raise _incomplete("a per-op profile")
    profiles: list[dict[str, Any]] = []
    owner = "graph"
    lines = iter(section.splitlines())
    slowest: list[dict[str, Any]] = []
    for line in lines:
        if match := _OWNER.match(line.strip()):
            owner = " ".join(filter(None, match.groups()))
        elif (match := _TITLE.search(line)) and match[1] == "Top by Computation Time":
            slowest = [_read_node(row) for row in _read_rows(lines)]
        elif match := _NODES.search(line):
            profiles.append({"graph": owner, "nodes_executed": int(match[1]), "by_type": [], "slowest": slowest})
            slowest = []
        elif (match := _TITLE.search(line)) and match[1] == "Summary by node type" and profiles:
            profiles[-1]["by_type"] = [_read_type(row) for row in _read_rows(lines)]
    if not profiles:
        raise _incomplete("how many nodes were executed")
    for profile in profiles:
        if not profile["nodes_executed"] or not profile["by_type"] or not profile["slowest"]:
            raise _incomplete(f"a whole profile of the {profile['graph']}")
        profile["by_type"].sort(key=lambda row: -row["share"])
        profile["slowest"] = sorted(profile["slowest"], key=lambda row: -row["share"])[:_MOST_NODES]
    return profiles


def _read_rows(lines: Any) -> list[dict[str, str]]:
    """Read a table, from its heading to the first empty line, as rows by lower-case column names."""
    names = [name.strip().lower() for name in re.findall(r"\[([^\]]+)\]", next(lines, ""))]
    rows = []
    for line in lines:
        if not line.strip():
            break
        values = _SEPARATOR.split(line.strip(), maxsplit=max(0, len(names) - 1))
        if len(values) != len(names):
            raise _incomplete(f"a profile's row with {len(names)} columns, but {line.strip()[:100]!r}")
        rows.append(dict(zip(names, values, strict=True)))
    return rows


def _read_node(row: dict[str, str]) -> dict[str, Any]:
    return {
        "node_type": _take(row, "node type"),
        "name": _take(row, "name"),
        "avg_ms": _number(row, "avg ms"),
        "share": _number(row, "%") / 100,
        "times_called": int(_number(row, "times called")),
    }


def _read_type(row: dict[str, str]) -> dict[str, Any]:
    return {
        "node_type": _take(row, "node type"),
        "count": int(_number(row, "count")),
        "avg_ms": _number(row, "avg ms"),
        "share": _number(row, "avg %") / 100,
        "times_called": int(_number(row, "times called")),
    }


def _take(row: dict[str, str], name: str) -> str:
    if name not in row:
        raise _incomplete(f"a profile's column {name!r}")
    return row[name].strip()


def _number(row: dict[str, str], name: str) -> float:
    """A fast node's time is rounded to 0.000; what is no number is an error."""
    text = _take(row, name).removesuffix("%")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise _incomplete(f"a profile's {name}: {text!r} is none")
    return value


def _incomplete(what: str) -> ToolReportInvalid:
    return ToolReportInvalid(f"benchmark_model did not report {what}.")
