"""Sizes as people read and write them. Pure.

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
