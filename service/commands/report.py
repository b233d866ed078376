"""What a finished job amounts to: the table, the failures, the exit code. Pure but for printing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.commands.output import format_bytes, format_error, print_table, say

_NONE = "-"
_COLUMNS = (
    "variant",
    "state",
    "engine",
    "format",
    "size",
    "error/range",
    "KL",
    "accuracy",
    "prefill tok/s",
    "decode tok/s",
    "file",
)
_NUMBERS = ("size", "error/range", "KL", "accuracy", "prefill tok/s", "decode tok/s")


def print_outcome(job: Mapping[str, Any]) -> None:
    """Print a row for every artifact, then every failure as a sentence, then what was reused."""
    rows = [row for variant in job["variants"] for row in _variant_rows(variant)]
    if rows:
        print_table(_COLUMNS, rows, right=_NUMBERS)
    for line in _failures(job):
        say(line)
    say_outcome(job)


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
    head = [variant["name"], variant["state"], variant["engine"]]
    parity = variant["parity"] or {}
    figures = [_number(parity.get("max_abs_error_ratio"), ".2g"), _number(parity.get("kl_mean"), ".2g")]
    if not variant["artifacts"]:
        error = variant["error"]
        return [[*head, _NONE, _NONE, *figures, _NONE, _NONE, _NONE, error["code"] if error else _NONE]]
    return [
        [
            *head,
            artifact["kind"],
            format_bytes(artifact["size_bytes"]),
            *figures,
            _accuracy(variant["quality"], artifact["kind"]),
            *_speeds(variant["measurements"], artifact["kind"]),
            artifact.get("path") or artifact["name"],
        ]
        for artifact in variant["artifacts"]
    ]


def _number(value: Any, form: str) -> str:
    return _NONE if value is None else format(value, form)


def _accuracy(quality: Mapping[str, Any] | None, kind: str) -> str:
    """Return exact match of the source and of the artifact, in percent."""
    own = ((quality or {}).get("by_format") or {}).get(kind) or quality or {}
    source, artifact = own.get("source_exact_match"), own.get("exact_match")
    if artifact is None:
        return _NONE
    return f"{_number(source, '.1%')} → {artifact:.1%}"


def _speeds(measurements: list[Mapping[str, Any]], kind: str) -> list[str]:
    found: Mapping[str, Any] = {}
    for measurement in measurements:
        if measurement.get("format") == kind:
            found = measurement
    names = ("prefill_tokens_per_s", "decode_tokens_per_s")
    return [_number((found.get(name) or {}).get("median"), ",.0f") for name in names]


def _failures(job: Mapping[str, Any]) -> list[str]:
    """Return one line for every variant that did not succeed, and for every failure that no variant tells of."""
    lines = []
    told = set()
    for variant in job["variants"]:
        if variant["error"]:
            told.add(variant["error"]["message"])
            lines.append(f"{variant['name']} {variant['state']}: {format_error(variant['error'])}")
    untold = [step for step in job["steps"] if step["state"] == "failed" and step["error"]]
    return lines + [
        f"{step['kind']} failed: {format_error(step['error'])}"
        for step in untold
        if step["error"]["message"] not in told
    ]
