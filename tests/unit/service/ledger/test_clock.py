"""The database's clock in statements: compiled once for each shift, and never one shift for another."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine, select

from service.ledger.clock import now


def test_a_statement_is_found_again_by_its_shift() -> None:
    keys = [select(now(offset_s))._generate_cache_key() for offset_s in (30, 30, 31, -30, 0)]
    assert all(key is not None for key in keys)
    assert keys[0] == keys[1]
    assert len({str(key) for key in keys}) == 4


@pytest.mark.parametrize("offset_s", [30.0, -30.0])
def test_equal_statements_with_other_shifts_tell_other_times(offset_s: float) -> None:
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        times = [connection.execute(select(now(shift))).scalar_one() for shift in (0.0, offset_s, 0.0)]
    engine.dispose()
    assert round((times[1] - times[0]).total_seconds() / 30) == (1 if offset_s > 0 else -1)
    assert (times[2] - times[0]).total_seconds() < 20
