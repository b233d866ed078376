"""A checkpoint's JSON files: bounded, and strictly parsed (`service.strict_json`).

Owns the refusals that every one of them shares. Called by the other modules of this room; knows nothing about what the
fields mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service import strict_json
from service.errors import CheckpointInvalid

#: Nesting beyond this has no honest use in a checkpoint.
MAX_DEPTH = 64


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """Return a file's bytes; raises `CheckpointInvalid` if there are more than `limit_bytes`."""
    with path.open("rb") as stream:
        data = stream.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise CheckpointInvalid(
            f"{path.name} has more than {limit_bytes} bytes; no honest file of this name is so large.",
            file=path.name,
            limit_bytes=limit_bytes,
        )
    return data


def parse_json(data: bytes | str, name: str) -> Any:
    """Parse a JSON text; `name` says in messages where it stands."""
    try:
        return strict_json.parse_json(data)
    except strict_json.JsonInvalid as error:
        raise CheckpointInvalid(f"{name} {error}.", file=name) from None


def read_json_object(path: Path, limit_bytes: int) -> dict[str, Any]:
    """Return the JSON object that a file of at most `limit_bytes` holds."""
    document = parse_json(read_bounded(path, limit_bytes), path.name)
    if not isinstance(document, dict):
        raise CheckpointInvalid(f"{path.name} is not a JSON object.", file=path.name)
    return document


def walk(document: Any, name: str) -> Iterator[tuple[str, str, Any]]:
    """Yield (dotted place, key, value) of every value in a document; items of a list carry the list's key."""
    pending: list[tuple[str, str, Any, int]] = [("", "", document, 0)]
    while pending:
        place, key, value, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise CheckpointInvalid(f"{name} is nested more than {MAX_DEPTH} deep.", file=name)
        if place:
            yield place, key, value
        if isinstance(value, dict):
            pending.extend(
                (f"{place}.{each}" if place else each, each, item, depth + 1) for each, item in value.items()
            )
        elif isinstance(value, list):
            pending.extend((f"{place}[{index}]", key, item, depth + 1) for index, item in enumerate(value))
