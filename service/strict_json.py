"""JSON that a stranger wrote: without duplicate keys, without values that JSON does not have, not nested for ever.

Owns the parsing alone; what fields mean, and which error a caller raises, are the caller's. Called by the rooms that
read checkpoints, recipes and other files of users.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

#: What Python starts with.
_RECURSION_LIMIT = 1000


class JsonInvalid(ValueError):
    """A text is not the JSON that is asked for; the message is the end of a sentence that the name of it begins."""


def parse_json(data: bytes | str) -> Any:
    """Return what a JSON text holds; raises `JsonInvalid`."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built: dict[str, Any] = {}
        for key, value in pairs:
            if key in built:
                raise JsonInvalid(f"has the key {key[:100]!r} twice")
            built[key] = value
        return built

    def refuse_constant(constant: str) -> NoReturn:
        raise JsonInvalid(f"holds {constant}, which is not JSON")

    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        with python_recursion_limit():
            return json.loads(text, object_pairs_hook=build, parse_constant=refuse_constant)
    except RecursionError:
        raise JsonInvalid("is nested too deeply") from None
    except UnicodeDecodeError:
        raise JsonInvalid("is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        where = f" (line {error.lineno})" if "\n" in text else ""
        raise JsonInvalid(f"is not JSON{where}; it may be truncated") from None
    except JsonInvalid:
        raise
    except ValueError:
        # An integer of more digits than Python converts.
        raise JsonInvalid("is not JSON; it may be truncated") from None


@contextlib.contextmanager
def python_recursion_limit() -> Iterator[None]:
    """Parse under Python's own limit: converters raise it so far that nesting would overflow the C stack instead."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(min(limit, _RECURSION_LIMIT))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
