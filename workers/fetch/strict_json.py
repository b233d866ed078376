"""JSON that a stranger wrote: bounded, without duplicate keys, without values that JSON does not have.

Owns the reading of a checkpoint's JSON files and the refusals that every one of them shares. Called by the other
modules of this room; knows nothing about what the fields mean.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from service.errors import CheckpointInvalid

#: Nesting beyond this has no honest use in a checkpoint.
MAX_DEPTH = 64
#: What Python starts with.
_RECURSION_LIMIT = 1000


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

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built: dict[str, Any] = {}
        for key, value in pairs:
            if key in built:
                raise CheckpointInvalid(f"{name} has the key {key[:100]!r} twice.", file=name)
            built[key] = value
        return built

    def refuse_constant(constant: str) -> NoReturn:
        raise CheckpointInvalid(f"{name} holds {constant}, which is not JSON.", file=name)

    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        with python_recursion_limit():
            return json.loads(text, object_pairs_hook=build, parse_constant=refuse_constant)
    except RecursionError:
        raise CheckpointInvalid(f"{name} is nested too deeply.", file=name) from None
    except UnicodeDecodeError:
        raise CheckpointInvalid(f"{name} is not UTF-8 text.", file=name) from None
    except ValueError as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise CheckpointInvalid(f"{name} is not JSON{where}; it may be truncated.", file=name) from None


@contextlib.contextmanager
def python_recursion_limit() -> Iterator[None]:
    """Parse under Python's own limit: converters raise it so far that nesting would overflow the C stack instead."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(min(limit, _RECURSION_LIMIT))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


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
