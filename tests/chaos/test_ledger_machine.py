"""Submitting, claiming, ending, expiring, cancelling, retrying, sharing, sweeping: in any order, on both databases."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from service.ledger import keys, moves, results
from service.ledger.database import Database
from tests.chaos import scale
from tests.chaos.ledger_machine import LedgerMachine

_SHORT = settings(
    max_examples=6,
    stateful_step_count=25,
    derandomize=True,
    database=None,
    deadline=None,
    # What fails is told as it was found: making it small would take longer than the rest of the tests.
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
_LONG = settings(
    _SHORT,
    max_examples=scale.EXAMPLES or 1,
    stateful_step_count=60,
    derandomize=False,
    phases=(Phase.generate, Phase.shrink),
    print_blob=True,
)


class Counter:
    """Gives identifiers in order, so that steps that are due in the same millisecond stay in order."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def token_hex(self, size_bytes: int) -> str:
        return f"{next(self._numbers):0{2 * size_bytes}x}"


@pytest.fixture(autouse=True)
def _ordered_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "secrets", Counter())


def play(database: Database, how: settings) -> None:
    run_state_machine_as_test(lambda: LedgerMachine(database), settings=how)


def test_no_order_of_moves_breaks_the_ledger(database: Database) -> None:
    play(database, _LONG if scale.EXAMPLES else _SHORT)


def test_control_without_the_fence_a_stale_write_is_found(
    sqlite_ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fenced = moves.move_step

    def unfenced(*args: Any, token: int | None = None, **values: Any) -> bool:
        return fenced(*args, **values)

    monkeypatch.setattr(results, "move_step", unfenced)
    database = Database(sqlite_ledger_url)
    try:
        with pytest.raises(AssertionError, match="a stale holder"):
            play(database, settings(_SHORT, max_examples=100))
    finally:
        database.close()
