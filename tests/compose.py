"""docker-compose.yml as Compose reads it: variables filled in, anchors merged.

Owns what the Compose specification calls interpolation, in the three forms that our file uses; any other is refused.
Starts nothing. Called by `tests/unit/test_compose.py` and `tests/acceptance/test_compose.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from tests.kiln import ROOT

Document = dict[str, Any]

FILE = ROOT / "docker-compose.yml"
#: A service with this image runs our code.
IMAGE = re.compile(r"edgekiln:.+")
#: `$$`, `${NAME}`, `${NAME:-default}`, `${NAME:?}`, or anything else that begins like one.
_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<name>\w+)(?:(?P<how>:-|:\?)(?P<rest>[^{}]*))?\}|(?P<wrong>.?))")


class MissingVariable(Exception):
    """A variable without a default is not set."""


def read_file() -> Document:
    """Return the file before its variables are filled in."""
    document: Document = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return document


def read_compose(variables: Mapping[str, str]) -> Document:
    """Return the file with its variables filled in; raises `MissingVariable`."""
    document: Document = _fill(read_file(), variables)
    return document


def find_variables(value: Any) -> dict[str, set[str]]:
    """Return the variables that a document names, and what follows each name (`:-8g`, `:?`)."""
    found: dict[str, set[str]] = {}
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            for name, forms in find_variables(part).items():
                found.setdefault(name, set()).update(forms)
    elif isinstance(value, str):
        for match in _VARIABLE.finditer(value):
            if match["name"]:
                found.setdefault(match["name"], set()).add((match["how"] or "") + (match["rest"] or ""))
    return found


def own_services(document: Document) -> dict[str, Document]:
    """Return the services that run our image."""
    return {name: service for name, service in document["services"].items() if IMAGE.fullmatch(service["image"])}


def _fill(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _fill(part, variables) for name, part in value.items()}
    if isinstance(value, list):
        return [_fill(part, variables) for part in value]
    return _VARIABLE.sub(lambda match: _look_up(match, variables), value) if isinstance(value, str) else value


def _look_up(match: re.Match[str], variables: Mapping[str, str]) -> str:
    if match["dollar"]:
        return "$"
    if not match["name"]:
        raise ValueError(f"{match.string!r}: a form of variable that this reader does not know")
    value = variables.get(match["name"], "")
    if value or not match["how"]:
        return value
    if match["how"] == ":?":
        raise MissingVariable(match["name"])
    return str(match["rest"])
