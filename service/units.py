"""Sizes and spans of time as people read and write them. Pure.

Decimal units as disks and download pages use them, and binary ones by their own names. Called by `service.choice` and
`service.commands`.
"""

from __future__ import annotations

import re

from service.errors import InvalidRequest

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]i?b|b)?", re.IGNORECASE | re.ASCII)
_FACTORS = {
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}

_SPAN = re.compile(r"(\d{1,9}) ?([smhdw])", re.ASCII)
_SPAN_UNITS_S = {"w": 7 * 24 * 3600, "d": 24 * 3600, "h": 3600, "m": 60, "s": 1}


def parse_bytes(text: str) -> int:
    """Return the bytes that `1.5 GB`, `512MiB` or `4096` mean; raises `InvalidRequest` for anything else.

    Strict on purpose: pydantic's `ByteSize` reads `1,5GB` as one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidRequest(
            f"{text!r} is not a size. Write a number with B, kB, MB, GB, TB or KiB, MiB, GiB, TiB, e.g. 1.5GB.",
            size=text,
        )
    return int(float(match[1]) * _FACTORS[(match[2] or "b").lower()])


def format_bytes(size_bytes: float | None) -> str:
    """Return a size as people read it, in decimal units: `1.7 MB`; `-` for none."""
    if size_bytes is None:
        return "-"
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if round(size, 1) < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def parse_span(text: str) -> int:
    """Return the seconds that `90s`, `30m`, `6h`, `1d` or `2w` mean; raises `InvalidRequest` for anything else."""
    match = _SPAN.fullmatch(text.strip().lower())
    if match is None:
        raise InvalidRequest(
            f"{text!r} is not a span of time. Write a whole number with s, m, h, d or w, e.g. 6h.", span=text
        )
    return int(match[1]) * _SPAN_UNITS_S[match[2]]


def format_span(span_s: int) -> str:
    """Return whole seconds in the largest unit that divides them: `6h`."""
    unit, length_s = next((unit, length_s) for unit, length_s in _SPAN_UNITS_S.items() if span_s % length_s == 0)
    return f"{span_s // length_s}{unit}"
