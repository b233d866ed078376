"""Every threat that docs/security.md names is shown to be met by tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.unit.test_documentation import read_tables

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/security.md").read_text(encoding="utf-8")
#: What a design of this kind must have an answer to, by a word of its row.
THREATS = (
    *("pickle", "code", "safetensors", "hub", "ssrf", "archive", "hostile model", "confine", "key", "tenant", "secret"),
    *("flood", "phone", "vulnerabilit"),
)


def read_threats(page: str) -> dict[str, list[str]]:
    """Return threat -> the tests that show its answer, as pytest names them."""
    rows = next(table for table in read_tables(page) if "shown by" in table[0])
    return {row["threat"]: re.findall(r"`(tests/[^`]+)`", row["shown by"]) for row in rows}


def find_missing(threats: dict[str, list[str]]) -> list[str]:
    """Return the tests that are named and not there, and the threats that name none."""
    missing = [f"no test for: {threat}" for threat, tests in threats.items() if not tests]
    for name in (name for tests in threats.values() for name in tests):
        path, _, function = name.partition("::")
        file = ROOT / path
        if not file.is_file() or (function and function not in list_functions(file)):
            missing.append(name)
    return missing


def list_functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_named_test_exists() -> None:
    assert find_missing(read_threats(PAGE)) == []


@pytest.mark.parametrize("word", THREATS)
def test_every_threat_has_a_row(word: str) -> None:
    assert any(word in threat.lower() for threat in read_threats(PAGE))


def test_a_test_that_is_gone_is_missed() -> None:
    """Control."""
    gone = {"fire": ["tests/unit/test_threats.py::test_gone", "tests/gone.py::test_x"], "water": []}
    assert find_missing(gone) == ["no test for: water", *gone["fire"]]
