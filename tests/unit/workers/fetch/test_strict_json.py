"""JSON from strangers, where only this room's reader stands between it and the C stack."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.errors import CheckpointInvalid
from workers.fetch.safetensors_header import read_header
from workers.fetch.strict_json import parse_json


@pytest.fixture
def high_limit() -> Iterator[int]:
    """The recursion limit as converters leave it."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000_000)
    yield 1_000_000
    sys.setrecursionlimit(limit)


def test_nesting_is_refused_even_where_a_library_raised_the_recursion_limit(high_limit: int) -> None:
    with pytest.raises(CheckpointInvalid, match="nested too deeply"):
        parse_json("[" * 200_000 + "]" * 200_000, "config.json")
    assert sys.getrecursionlimit() == high_limit


@pytest.mark.usefixtures("high_limit")
def test_so_is_a_nested_safetensors_header(tmp_path: Path) -> None:
    header = b'{"a":' + b"[" * 200_000
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointInvalid, match="not JSON"):
        read_header(path)
