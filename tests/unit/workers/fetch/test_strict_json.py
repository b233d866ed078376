"""JSON from strangers, where only this room's reader stands between it and the C stack."""

from __future__ import annotations

import sys

import pytest

from service.errors import CheckpointInvalid
from workers.fetch.strict_json import parse_json


def test_nesting_is_refused_even_where_a_library_raised_the_recursion_limit() -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000_000)
    try:
        with pytest.raises(CheckpointInvalid, match="nested too deeply"):
            parse_json("[" * 200_000 + "]" * 200_000, "config.json")
        assert sys.getrecursionlimit() == 1_000_000
    finally:
        sys.setrecursionlimit(limit)
