"""`edgekiln history` and `edgekiln difference`: measurements over time, and what two of them say of each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from service.commands import options
from service.commands.output import format_figure, format_time, print_json, print_table, say
from service.errors import InvalidRequest

HISTORY_EPILOG = """Examples:

\b
  edgekiln history
  edgekiln history --model SmolLM-135M --device R5CT1234567 --plot decode.svg
  edgekiln history --metric peak_anon_bytes --json
"""
DIFFERENCE_EPILOG = """Examples:

\b
  edgekiln difference step_1f0c9a2b3c4d5e6f step_2e9d4c1b5a6f7081
  edgekiln difference BASELINE CANDIDATE --json | jq -r '.changes[] | [.metric, .verdict] | @tsv'
"""
#: Shown where nothing else is asked for: the first of them that a measurement has.
_METRICS = ("decode_tokens_per_s", "latency_ms")

MeasurementId = Annotated[str, typer.Argument(help="A measurement's id, as `edgekiln history` lists it.")]


def history(
    model: Annotated[
        str | None, typer.Option("--model", metavar="M", help="A source without revision, or its last part.")
    ] = None,
    variant: Annotated[str | None, typer.Option("--variant", metavar="V", help="Only this variant.")] = None,
    format: Annotated[str | None, typer.Option("--format", "-f", metavar="F", help="Only this format.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="ID", help="Only this device: a phone's serial number.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", help="What to show. [default: decode speed, or latency]")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, max=500, help="The newest N.")] = 50,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw them over time too.")] = None,
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Show measurements over time, oldest first."""
    if plot is not None and plot.suffix != ".svg":
        raise InvalidRequest(f"--plot {plot}: the picture is an SVG; name a file that ends in .svg.")
    with options.connect(url, api_key) as client:
        found = client.history(model=model, variant=variant, format=format, device=device, limit=limit)
    if plot is not None:
        from service.commands.plot import draw_history

        plot.write_text(draw_history([(each, *find_figure(each, metric)) for each in found]), encoding="utf-8")
        say(f"{plot} shows {len(found)} measurements.")
    if as_json:
        print_json(found)
        return
    metrics = {find_figure(each, metric)[0] for each in found}
    figure = metrics.pop() if len(metrics) == 1 else "figure"
    columns = ("id", "measured", "what", "device, tool", figure, "verdict")
    # Numbers are never folded, and an id is to be copied.
    print_table(columns, [_row(each, metric, names_metric=bool(metrics)) for each in found], right=("id", figure))


def find_figure(entry: Mapping[str, Any], metric: str | None) -> tuple[str, float | None, Any]:
    """Return name, figure and interval of the metric that is asked for, or of the usual one."""
    known = {**entry["metrics"], **{name: {"median": value} for name, value in entry["memory"].items()}}
    wanted = (metric,) if metric else _METRICS
    name = next((name for start in wanted for name in known if name == start or name.startswith(f"{start}.")), None)
    found = known.get(name, {}) if name else {}
    return name or wanted[0], found.get("median"), found.get("interval")


def _row(entry: Mapping[str, Any], metric: str | None, *, names_metric: bool) -> list[str]:
    name, figure, interval = find_figure(entry, metric)
    what = f"{entry['model'].rstrip('/').rpartition('/')[2]}, {entry['variant']}, {entry['format']}"
    text = format_figure(name, figure)
    if interval:
        text += f" [{', '.join(format_figure(name, bound) for bound in interval)}]"
    return [
        entry["id"],
        format_time(entry["measured_at"]),
        f"{what}: {name}" if names_metric else what,
        f"{name_device(entry)}, {_name_tool(entry['tool'])}",
        text,
        entry["verdict"] or "-",
    ]


def name_device(entry: Mapping[str, Any]) -> str:
    """Return what a device is called; one that is no phone is called so."""
    name = entry["device_name"] or entry["device_id"]
    label = {"phone": f" ({entry['device_id']})", "virtual": " (virtual)"}.get(entry["device_kind"], "")
    return f"{name}{label}"


def _name_tool(tool: Mapping[str, Any] | None) -> str:
    if not tool:
        return "-"
    if "version" in tool:
        return f"{tool.get('name', '')} {tool['version']}".strip()
    return ", ".join(f"{name} {version}" for name, version in tool.items())


def difference(
    baseline: MeasurementId,
    candidate: MeasurementId,
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Compare two measurements.

    Of two artifacts, devices, tool versions or dates: what became of each metric, and how sure that is.
    """
    with options.connect(url, api_key) as client:
        found = client.difference(baseline, candidate)
    if as_json:
        print_json(found)
        return
    rows = [
        [
            change["metric"],
            *(format_figure(change["metric"], change[name]) for name in ("baseline", "candidate")),
            f"{change['ratio']:.3f}",
            "-" if change["interval"] is None else f"{change['interval'][0]:.3f} to {change['interval'][1]:.3f}",
            change["verdict"],
        ]
        for change in found["changes"]
    ]
    numbers = ("baseline", "candidate", "ratio")
    print_table(("metric", *numbers, "95 % interval", "verdict"), rows, right=numbers)
    turns = ", whose processes ran in turns" if found["is_paired"] else ""
    say(f"Two measurements{turns} that differ in {', '.join(found['differs']) or 'nothing'}.")
