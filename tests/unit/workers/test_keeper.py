"""The keeper of a lease: what it notices, whatever the ledger does meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from service.errors import LeaseLost
from service.ledger import claims, jobs
from service.ledger.database import Database
from service.settings import Settings, load_settings
from tests.ledger_play import TENANT, Play
from workers import keeper as module
from workers.keeper import LeaseKeeper

#: How long a test waits for what must happen; no test lasts that long.
PATIENCE_S = 30.0


class TroubledDatabase(Database):
    """A ledger whose every call first meets `trouble`."""

    trouble: Callable[[], None] = staticmethod(lambda: None)

    def write(self, function: Callable[[Any], Any]) -> Any:
        self.trouble()
        return super().write(function)

    def read(self, function: Callable[[Any], Any]) -> Any:
        self.trouble()
        return super().read(function)


@pytest.fixture
def database(sqlite_ledger_url: str) -> Iterator[TroubledDatabase]:
    database = TroubledDatabase(sqlite_ledger_url)
    yield database
    database.close()


@pytest.fixture
def play(database: TroubledDatabase) -> Play:
    return Play(database)


@pytest.fixture
def claim(play: Play) -> claims.Claim:
    play.submit()
    claim = play.claim()
    assert claim is not None
    return claim


def make_settings(**settings: float) -> Settings:
    return load_settings({"lease_s": 600.0, "heartbeat_s": 0.01, "cancel_poll_s": 0.01, **settings})


def wait_until(is_so: Callable[[], bool]) -> None:
    pulse = threading.Event()
    for _ in range(int(PATIENCE_S / 0.01)):
        if is_so():
            return
        pulse.wait(0.01)
    pytest.fail("it did not happen")


def test_a_lease_is_extended(database: TroubledDatabase, claim: claims.Claim) -> None:
    with LeaseKeeper(make_settings(), database, claim) as keeper:
        first = keeper.held_until
        wait_until(lambda: keeper.held_until > first)
        keeper.check()


def test_a_cancelled_step_is_noticed(database: TroubledDatabase, play: Play, claim: claims.Claim) -> None:
    with LeaseKeeper(make_settings(), database, claim) as keeper:
        assert not keeper.is_lost
        assert claim.job_id is not None
        jobs.cancel_job(database, TENANT, claim.job_id)
        wait_until(lambda: keeper.is_lost)
        with pytest.raises(LeaseLost):
            keeper.check()


def test_a_lease_that_runs_out_is_noticed_while_the_ledger_hangs(
    database: TroubledDatabase, claim: claims.Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_JOIN_S", 0.05)
    goes_on, is_hanging = threading.Event(), threading.Event()

    def hang() -> None:
        is_hanging.set()
        assert goes_on.wait(PATIENCE_S)

    database.trouble = hang
    try:
        with LeaseKeeper(make_settings(lease_s=0.2), database, claim) as keeper:
            assert is_hanging.wait(PATIENCE_S)
            wait_until(lambda: keeper.is_lost)
        # It is left alone: what it may still write is fenced.
        assert not goes_on.is_set()
    finally:
        goes_on.set()
    wait_until(lambda: not any(thread.name == f"lease-{claim.step_id}" for thread in threading.enumerate()))
    assert keeper.is_lost, "for good, though the ledger answered in the end"


@pytest.mark.parametrize(
    "error",
    [OperationalError("UPDATE", {}, Exception("gone")), RuntimeError("nobody foresaw this")],
    ids=["away", "bug"],
)
def test_a_keeper_outlives_what_the_ledger_raises(
    error: Exception, database: TroubledDatabase, claim: claims.Claim
) -> None:
    tries = iter(range(3))

    def fail() -> None:
        if next(tries, None) is not None:
            raise error

    database.trouble = fail
    with LeaseKeeper(make_settings(), database, claim) as keeper:
        first = keeper.held_until
        wait_until(lambda: keeper.held_until > first)
        assert not keeper.is_lost


def test_a_ledger_that_is_away_for_a_lease_loses_the_step(database: TroubledDatabase, claim: claims.Claim) -> None:
    def fail() -> None:
        raise RuntimeError("nobody foresaw this")

    database.trouble = fail
    with LeaseKeeper(make_settings(lease_s=0.2), database, claim) as keeper:
        wait_until(lambda: keeper.is_lost)
