"""A comparison as a picture: quality against size, speed and memory, as one SVG. Pure.

Owns scales, marks and labels. Draws the document that `service.comparison.describe_comparison` makes; a figure that is
missing is not drawn, and the picture says for whom. And measurements over time, with the bounds that hold each. Called
by `edgekiln compare --plot` and `edgekiln history --plot`.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

from service.comparison import AXES, ROUNDING_KL, Axis
from service.units import format_bytes

_PANEL = (420, 300)
_MARGIN = {"left": 62, "right": 20, "top": 56, "bottom": 58}
_LINE = 14
#: About the width of a letter of a label, in pixels.
_LETTER = 6.3
_QUALITY = AXES["quality"]
_HISTORY_PANEL = (860, 340)
_SERIES_COLOURS = ("#0969da", "#1a7f37", "#8250df", "#bf8700", "#bc4c00", "#57606a")
_INK, _FAINT, _BEST, _REFUSED = "#24292f", "#d0d7de", "#0969da", "#cf222e"


@dataclass(frozen=True)
class _Scale:
    """Maps figures to pixels."""

    position: Callable[[float], float]
    ticks: Sequence[float]


def draw_front(front: Mapping[str, Any], title: str) -> str:
    """Return an SVG document of one format's artifacts: a panel for each axis that someone has a figure on."""
    candidates = front["candidates"]
    axes = [axis for axis in AXES.values() if axis != _QUALITY and _measured(candidates, axis)]
    width = max(1, len(axes)) * _PANEL[0]
    root = ET.Element(
        "svg", xmlns="http://www.w3.org/2000/svg", width=f"{width}", height=f"{_PANEL[1] + 2 * _LINE}", fill=_INK
    )
    root.set("viewBox", f"0 0 {width} {_PANEL[1] + 2 * _LINE}")
    root.set("font-family", "system-ui, sans-serif")
    root.set("font-size", "11")
    _add(root, "rect", width="100%", height="100%", fill="white")
    _text(root, 12, 20, title, weight="bold", size="13")
    for number, axis in enumerate(axes):
        _draw_panel(_add(root, "g", transform=f"translate({number * _PANEL[0]} 0)"), candidates, axis)
    legend = "● not beaten on all axes at once   ○ beaten   ✗ not published"
    _text(root, 12, _PANEL[1] + 4, legend)
    absent = [each["variant"] for each in candidates if _find(each, _QUALITY) is None]
    if absent:
        _text(root, 12, _PANEL[1] + 4 + _LINE, f"Not measured: {', '.join(absent)}.")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


#: An entry of the history, the metric that is shown of it, its figure, and the bounds that hold it.
Point = tuple[Mapping[str, Any], str, float | None, Sequence[float] | None]


def draw_history(points: Sequence[Point]) -> str:
    """Return an SVG document of measurements over time: a line a series; what is not stable is a cross beside it."""
    series: dict[str, list[Point]] = {}
    for point in points:
        if point[2] is not None:
            series.setdefault(_name_series(point), []).append(point)
    width, height = _HISTORY_PANEL
    whole = height + _LINE * (len(series) + 1)
    root = ET.Element("svg", xmlns="http://www.w3.org/2000/svg", width=f"{width}", height=f"{whole}", fill=_INK)
    root.set("viewBox", f"0 0 {width} {whole}")
    root.set("font-family", "system-ui, sans-serif")
    root.set("font-size", "11")
    _add(root, "rect", width="100%", height="100%", fill="white")
    if not series:
        _text(root, 12, 20, "No measurement has this metric.", weight="bold", size="13")
    else:
        _draw_series(root, series)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def _draw_series(root: ET.Element, series: Mapping[str, Sequence[Point]]) -> None:
    drawn = [point for points in series.values() for point in points]
    width, height = _HISTORY_PANEL
    left, right, top, bottom = _MARGIN["left"], width - _MARGIN["right"], _MARGIN["top"], height - 30
    up = _scale_linear([max(figure or 0.0, *(bounds or (0.0,))) for _, _, figure, bounds in drawn], bottom, top)
    at = {point[0]["id"]: dt.datetime.fromisoformat(point[0]["measured_at"]).timestamp() for point in drawn}
    first, last = min(at.values()), max(at.values())
    for tick in up.ticks:
        y = up.position(tick)
        _add(root, "line", x1=left, x2=right, y1=y, y2=y, stroke=_FAINT)
        _text(root, left - 6, y + 4, f"{tick:,.10g}", anchor="end")
    _text(root, 12, 20, ", ".join(dict.fromkeys(name for _, name, _, _ in drawn)), weight="bold", size="13")
    for instant, x, anchor in ((first, left, "start"), (last, right, "end")):
        _text(root, x, bottom + 16, f"{dt.datetime.fromtimestamp(instant, dt.UTC):%Y-%m-%d %H:%M}", anchor=anchor)
    for number, (name, points) in enumerate(series.items()):
        colour = _SERIES_COLOURS[number % len(_SERIES_COLOURS)]
        places = [
            (
                left + 8 + (right - left - 16) * (at[entry["id"]] - first) / ((last - first) or 1),
                figure or 0.0,
                entry,
                bounds,
            )
            for entry, _, figure, bounds in points
        ]
        steady = " ".join(f"{x:.1f},{up.position(y):.1f}" for x, y, entry, _ in places if entry["verdict"] == "stable")
        _add(root, "polyline", points=steady, fill="none", stroke=colour)
        for across, figure, entry, bounds in places:
            _draw_measurement(root, (across, up.position(figure)), entry, colour)
            if bounds:
                low, high = (up.position(bound) for bound in bounds)
                _add(root, "line", x1=across, x2=across, y1=low, y2=high, stroke=colour)
        _add(root, "circle", cx=18, cy=height + _LINE * number, r=4, fill=colour)
        _text(root, 28, height + 4 + _LINE * number, name)


def _draw_measurement(root: ET.Element, place: tuple[float, float], entry: Mapping[str, Any], colour: str) -> None:
    x, y = place
    if entry["verdict"] == "stable":
        mark = _add(root, "circle", cx=x, cy=y, r=4, fill=colour)
    else:
        mark = _add(root, "path", d=f"M{x - 4:.1f} {y - 4:.1f}l8 8m-8 0l8 -8", stroke=colour)
    _add(mark, "title").text = f"{entry['id']}, {entry['measured_at']}: {entry['verdict']}"


def _name_series(point: Point) -> str:
    entry, metric, _, _ = point
    how = entry["ran_on"] or entry["backend"]
    kind = "" if entry["device_kind"] == "phone" else f" ({entry['device_kind']})"
    words = (
        entry["model"],
        entry["variant"],
        entry["format"],
        f"{entry['device_id']}{kind}",
        f"{how} {entry['threads'] or ''}",
    )
    return f"{metric}: {', '.join(str(word).strip() for word in words)}"


def _draw_panel(panel: ET.Element, candidates: Sequence[Mapping[str, Any]], axis: Axis) -> None:
    drawn = _measured(candidates, axis)
    left, right = _MARGIN["left"], _PANEL[0] - _MARGIN["right"]
    top, bottom = _MARGIN["top"], _PANEL[1] - _MARGIN["bottom"]
    across = _scale_linear([_find(each, axis) or 0.0 for each in drawn], left, right)
    up = _scale_log([_find(each, _QUALITY) or 0.0 for each in drawn], top, bottom)
    for tick in across.ticks:
        x = across.position(tick)
        _add(panel, "line", x1=x, x2=x, y1=top, y2=bottom, stroke=_FAINT)
        _text(panel, x, bottom + 15, _say_tick(axis, tick), anchor="middle")
    for tick in up.ticks:
        y = up.position(tick)
        _add(panel, "line", x1=left, x2=right, y1=y, y2=y, stroke=_FAINT)
        _text(panel, left - 6, y + 4, f"{'≤ ' if tick == ROUNDING_KL else ''}{tick:.0e}", anchor="end")
    better = "← better" if axis.better == "lower" else "better →"
    unit = ", tokens/s" if axis.figure_name.endswith("_tokens_per_s") else ""
    _text(panel, (left + right) / 2, bottom + 32, f"{axis.name}{unit} ({better})", anchor="middle")
    _text(panel, left, top - 12, "KL divergence from the source, nats (↑ better)")
    places = [(across.position(_find(each, axis) or 0.0), up.position(_find(each, _QUALITY) or 0.0)) for each in drawn]
    for each, place in zip(drawn, places, strict=True):
        _draw_mark(panel, each, axis, place)
    _draw_labels(panel, [each["variant"] for each in drawn], places, (left + right) / 2)


def _draw_mark(panel: ET.Element, candidate: Mapping[str, Any], axis: Axis, place: tuple[float, float]) -> None:
    x, y = place
    is_published = candidate["artifact"] is not None
    if is_published:
        mark = _add(panel, "circle", cx=x, cy=y, r=5, stroke=_BEST, fill=_BEST if candidate["is_pareto"] else "white")
    else:
        mark = _add(panel, "path", d=f"M{x - 4:.1f} {y - 4:.1f}l8 8m-8 0l8 -8", stroke=_REFUSED)
    mark.set("stroke-width", "2")
    figures = ", ".join(
        f"{known.name} {known.say(figure)}"
        for known in AXES.values()
        if (figure := _find(candidate, known)) is not None
    )
    # Browsers show it when the pointer rests on the mark.
    _add(mark, "title").text = f"{candidate['variant']} ({candidate['state']}): {figures}"


def _draw_labels(panel: ET.Element, names: Sequence[str], places: Sequence[tuple[float, float]], middle: float) -> None:
    """Write each name beside its mark, moved down where another stands, with a line to its mark then."""
    # What labels keep clear of: left, right and height of each mark and of each label written so far.
    taken = [(x - 6, x + 6, y) for x, y in places]
    for (x, y), name in sorted(zip(places, names, strict=True), key=lambda item: item[0][1]):
        is_right = x <= middle
        start, end = (x + 9, x + 9 + len(name) * _LETTER) if is_right else (x - 9 - len(name) * _LETTER, x - 9)
        free = y
        while blockers := [
            height for left, right, height in taken if start < right and left < end and abs(free - height) < _LINE - 1
        ]:
            free = max(blockers) + _LINE
        taken.append((start, end, free))
        edge = start if is_right else end
        if free != y:
            _add(panel, "line", x1=x, y1=y, x2=edge, y2=free, stroke=_INK, opacity=0.5)
        _text(panel, edge, free + 4, name, anchor="start" if is_right else "end")


def _find(candidate: Mapping[str, Any], axis: Axis) -> float | None:
    figure: float | None = candidate["figures"].get(axis.figure_name)
    return figure


def _measured(candidates: Sequence[Mapping[str, Any]], axis: Axis) -> list[Mapping[str, Any]]:
    """Return the candidates that can be drawn against an axis."""
    return [each for each in candidates if _find(each, axis) is not None and _find(each, _QUALITY) is not None]


def _scale_linear(figures: Sequence[float], start: float, end: float) -> _Scale:
    """From 0 to a little more than the largest, with ticks at 1, 2 or 5 times a power of ten."""
    most = max(figures) * 1.08 or 1.0
    power = 10.0 ** math.floor(math.log10(most / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if most / (power * factor) <= 5)
    ticks = [step * number for number in range(int(most / step) + 1)]
    return _Scale(lambda figure: start + (end - start) * figure / most, ticks)


def _scale_log(figures: Sequence[float], best: float, worst: float) -> _Scale:
    """By powers of ten, down to where figures count as equal."""
    exponents = [math.log10(max(figure, ROUNDING_KL)) for figure in figures]
    low, high = math.floor(min(exponents)), math.ceil(max(exponents))
    high = max(high, low + 1)
    share = (worst - best) / (high - low)

    def position(figure: float) -> float:
        return best + share * (math.log10(max(figure, ROUNDING_KL)) - low)

    return _Scale(position, [10.0**exponent for exponent in range(low, high + 1)])


def _say_tick(axis: Axis, tick: float) -> str:
    if not axis.figure_name.endswith("_bytes"):
        return f"{tick:,.10g}"
    return "0" if tick == 0 else format_bytes(tick).replace(".0 ", " ")


def _add(parent: ET.Element, tag: str, **attributes: Any) -> ET.Element:
    texts = {name: f"{value:.1f}" if isinstance(value, float) else str(value) for name, value in attributes.items()}
    return ET.SubElement(parent, tag, texts)


def _text(
    parent: ET.Element,
    x: float,
    y: float,
    words: str,
    *,
    anchor: str = "start",
    weight: str = "normal",
    size: str = "11",
) -> None:
    element = _add(parent, "text", x=x, y=y)
    element.set("text-anchor", anchor)
    element.set("font-weight", weight)
    element.set("font-size", size)
    element.text = words
