"""Transactions that meet rivals: repeated with a pause, and given up with an error that says "try again"."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import QueuePool

from service.errors import LedgerBusy
from service.ledger import database as module
from service.ledger.database import Database, StaleView, Transaction, ping


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses made, none of which is waited for."""
    made: list[float] = []
    monkeypatch.setattr(time, "sleep", made.append)
    monkeypatch.setattr(random, "uniform", lambda _low, high: high)
    return made


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield database
    database.close()


def locked() -> OperationalError:
    return OperationalError("UPDATE", {}, Exception("database is locked"))


@pytest.mark.parametrize("rival", [StaleView(), locked()], ids=["stale view", "locked"])
def test_a_transaction_that_meets_rivals_is_repeated_after_growing_pauses(
    rival: Exception, ledger: Database, pauses: list[float]
) -> None:
    def change(transaction: Transaction) -> str:
        if len(pauses) < 4:
            raise rival
        return "done"

    assert ledger.write(change) == "done"
    assert [pause for pause in pauses if pause] == sorted({pause for pause in pauses if pause})
    assert len([pause for pause in pauses if pause]) == 3


@pytest.mark.parametrize("rival", [StaleView(), locked()], ids=["stale view", "locked"])
def test_a_transaction_that_meets_rivals_for_ever_may_be_tried_again_later(
    rival: Exception, ledger: Database, pauses: list[float]
) -> None:
    def change(transaction: Transaction) -> None:
        raise rival

    with pytest.raises(LedgerBusy) as refused:
        ledger.write(change)
    assert refused.value.retryable
    assert refused.value.http_status == 503


def test_a_wrong_statement_is_not_repeated(ledger: Database, pauses: list[float]) -> None:
    with pytest.raises(OperationalError, match="no such table"):
        ledger.write(lambda transaction: transaction.connection.execute(text("SELECT * FROM nowhere")))
    assert not any(pauses)


def test_no_connection_to_spare_is_busy_for_readers_and_writers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_small_engine(url: str) -> object:
        return create_engine(url, poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=0)

    monkeypatch.setattr(module, "_make_engine", make_small_engine)
    database = Database(f"sqlite:///{tmp_path / 'ledger.db'}")
    with database.engine.connect():
        with pytest.raises(LedgerBusy):
            ping(database)
        with pytest.raises(LedgerBusy):
            database.write(lambda transaction: None)
    ping(database)
    database.close()
