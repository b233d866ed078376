"""Byte ranges and validators of HTTP (RFC 9110). Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from service.errors import RangeNotSatisfiable

_RANGE = re.compile(r"\s*bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.IGNORECASE)


@dataclass(frozen=True)
class ByteRange:
    """The bytes `[start, end)`."""

    start: int
    end: int


def parse_range(header: str | None, size_bytes: int) -> ByteRange | None:
    """Return the one range that a Range header asks for; None means the whole.

    Several ranges, other units and malformed headers are ignored, as the RFC allows. Raises `RangeNotSatisfiable`.
    """
    match = _RANGE.fullmatch(header or "")
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        length = int(match[2])
        wanted = ByteRange(max(0, size_bytes - length), size_bytes) if length else ByteRange(size_bytes, size_bytes)
    else:
        start = int(match[1])
        end = min(int(match[2]) + 1, size_bytes) if match[2] else size_bytes
        if match[2] and int(match[2]) < start:
            return None
        wanted = ByteRange(start, end)
    if wanted.start >= size_bytes:
        raise RangeNotSatisfiable(
            f"The artifact has {size_bytes} bytes; there is nothing at byte {wanted.start}.", size_bytes=size_bytes
        )
    return wanted


def matches(header: str | None, etag: str) -> bool:
    """Whether an If-None-Match header names this entity (weak comparison)."""
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags
