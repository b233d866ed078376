"""What a finished job amounts to: the table, the failures, the exit code. Pure but for printing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.commands.output import format_error, format_failure, print_table, say
from service.units import format_bytes

_NONE = "-"
_NUMBERS = ("size", "error/\nrange", "KL", "exact\nmatch", "prefill\ntok/s", "decode\ntok/s")
_MEASURED_NUMBERS = ("prefill\ntok/s", "decode\ntok/s", "TTFT\nms", "PSS", "smoke\nmatch")
_MEASURED_COLUMNS = ("variant", "format", "device", "on", "tool", *_MEASURED_NUMBERS, "verdict")
_COLUMNS = ("variant", "state", "format", *_NUMBERS)


def print_outcome(job: Mapping[str, Any]) -> None:
    """Print a row for every artifact, then what they share, every failure as a sentence, and what was reused."""
    rows = [row for variant in job["variants"] for row in _variant_rows(variant)]
    if rows:
        print_table(_COLUMNS, rows, right=_NUMBERS)
    measured = [row for variant in job["variants"] for row in _measurement_rows(variant)]
    if measured:
        print_table(_MEASURED_COLUMNS, measured, right=_MEASURED_NUMBERS)
    for line in (*_profiles(job), *_shared(job), *_failures(job)):
        say(line)
    say_outcome(job)


def _profiles(job: Mapping[str, Any]) -> list[str]:
    """Return a line for every graph that a phone was asked to profile: what takes its time, the most first."""
    return [
        f"Profile of {variant['name']} on {_name_device(measurement['device'])}, {signature}, {graph['graph']} "
        f"({graph['nodes_executed']} nodes): "
        + ", ".join(
            f"{row['node_type']} {row['share']:.0%} ({row['avg_ms']:.3g} ms, {row['count']}x)"
            for row in graph["by_type"]
        )
        for variant in job["variants"]
        for measurement in variant["measurements"]
        for signature, graphs in (measurement.get("profile") or {}).items()
        for graph in graphs
    ]


def _shared(job: Mapping[str, Any]) -> list[str]:
    """Return what is the same for all rows: engines, the source's accuracy, where the files are."""
    engines = {variant["engine"]: None for variant in job["variants"]}
    lines = [f"Engine: {', '.join(engines)}."] if engines else []
    sources = [variant["quality"]["source_exact_match"] for variant in job["variants"] if _has_evaluation(variant)]
    if sources:
        lines.append(f"Exact match of the source: {sources[0]:.1%}.")
    artifacts = [artifact for variant in job["variants"] for artifact in variant["artifacts"]]
    folders = {str(Path(artifact["path"]).parent): None for artifact in artifacts if "path" in artifact}
    if folders:
        lines.append(f"Files: {len(artifacts)} in {', '.join(folders)}.")
    return lines


def _has_evaluation(variant: Mapping[str, Any]) -> bool:
    return (variant["quality"] or {}).get("source_exact_match") is not None


def say_outcome(job: Mapping[str, Any]) -> None:
    """Say how the job ended and how much of it was not new."""
    say(f"Job {job['id']}: {job['state']}. {_count_reused(job)}")


def exit_code(job: Mapping[str, Any]) -> int:
    """Return 0 only if every variant succeeded."""
    return 0 if job["state"] == "succeeded" else 1


def _count_reused(job: Mapping[str, Any]) -> str:
    steps = job["steps"]
    reused = sum(bool(step["reused"]) for step in steps)
    if reused:
        return f"{reused} of {len(steps)} steps were reused from earlier work."
    return f"{len(steps)} step{'' if len(steps) == 1 else 's'}, none reused."


def _variant_rows(variant: Mapping[str, Any]) -> list[list[str]]:
    head = [variant["name"], variant["state"]]
    parity = variant["parity"] or {}
    figures = [_number(parity.get("max_abs_error_ratio"), ".2g"), _number(parity.get("kl_mean"), ".2g")]
    kinds = {artifact["kind"]: format_bytes(artifact["size_bytes"]) for artifact in variant["artifacts"]}
    # A job may measure what another has published.
    kinds = kinds or {measurement["format"]: _NONE for measurement in variant["measurements"]}
    return [
        [
            *head,
            kind,
            size,
            *figures,
            _accuracy(variant["quality"], kind),
            *_speeds(variant["measurements"], kind),
        ]
        for kind, size in (kinds or {_NONE: _NONE}).items()
    ]


def _number(value: Any, form: str) -> str:
    return _NONE if value is None else format(value, form)


def _accuracy(quality: Mapping[str, Any] | None, kind: str) -> str:
    """Return the artifact's exact match; the graph's where there is no artifact."""
    own = ((quality or {}).get("by_format") or {}).get(kind) or quality or {}
    return _number(own.get("exact_match"), ".1%")


def _speeds(measurements: list[Mapping[str, Any]], kind: str) -> list[str]:
    found: Mapping[str, Any] = {}
    for measurement in measurements:
        if measurement.get("format") == kind and not _is_phone(measurement):
            found = measurement
    names = ("prefill_tokens_per_s", "decode_tokens_per_s")
    return [_number((found.get(name) or {}).get("median"), ",.0f") for name in names]


def _is_phone(measurement: Mapping[str, Any]) -> bool:
    return (measurement.get("device") or {}).get("kind") in ("phone", "virtual")


def _measurement_rows(variant: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for every measurement on a phone; those of the host stand beside the artifacts."""
    return [
        [
            variant["name"],
            measurement["format"],
            _name_device(measurement["device"]),
            _name_way(measurement),
            (measurement["device"].get("tool") or {}).get("version", _NONE),
            *(_figure(measurement, name) for name in ("prefill_tokens_per_s", "decode_tokens_per_s")),
            _figure(measurement, "ttft_s", 1000),
            format_bytes(measurement["peak_pss_bytes"]) if measurement.get("peak_pss_bytes") else _NONE,
            _number((measurement.get("smoke") or {}).get("match_ratio"), ".0%"),
            measurement["verdict"],
        ]
        for measurement in variant["measurements"]
        if _is_phone(measurement)
    ]


def _name_way(measurement: Mapping[str, Any]) -> str:
    """What a phone was asked to compute on, and where it really did, where that is not the same."""
    way = f"{measurement['backend']} {measurement['threads'] or ''}".strip()
    return f"{way}, ran on {measurement['ran_on']}" if measurement.get("ran_on") else way


def _name_device(device: Mapping[str, Any]) -> str:
    """What a device is called; one that is no phone is called so."""
    name = str(device.get("model") or device.get("serial"))
    return f"{name} (virtual)" if device["kind"] == "virtual" else name


def _figure(measurement: Mapping[str, Any], name: str, factor: float = 1) -> str:
    """Return a median with the bounds that hold it."""
    found = measurement.get(name)
    if not found:
        return _NONE
    text = f"{found['median'] * factor:,.0f}"
    if found.get("interval"):
        low, high = (value * factor for value in found["interval"])
        text += f" [{low:,.0f}, {high:,.0f}]"
    return text


def _failures(job: Mapping[str, Any]) -> list[str]:
    """Return one line for every variant that did not succeed, and for every failure that no variant tells of."""
    lines = []
    told = set()
    for variant in job["variants"]:
        if variant["error"]:
            told.add(variant["error"]["message"])
            lines.append(f"{variant['name']} {format_failure(variant['state'], variant['error'])}")
    # A benchmark that measured only some of its arms has succeeded, and has an error.
    untold = [step for step in job["steps"] if step["state"] in ("failed", "succeeded") and step["error"]]
    return lines + [
        f"{step['kind']} failed: {format_error(step['error'])}"
        for step in untold
        if step["error"]["message"] not in told
    ]
