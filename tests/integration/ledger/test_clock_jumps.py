"""Clocks that jump: the database's, by which leases end, and the host's, by which nothing does."""

from __future__ import annotations

import time

import pytest

from service.errors import LeaseLost
from service.ledger import claims
from service.ledger.claims import Claim
from service.ledger.database import Database
from tests.ledger_clock import LedgerClock
from tests.ledger_invariants import find_stale_writes, read_ledger
from tests.ledger_play import POLICY, Play, outputs_of


class Bench:
    """A ledger whose clock is set, and two workers."""

    def __init__(self, database: Database) -> None:
        self.clock = LedgerClock(database, "2026-11-21 12:00:00")
        self.play = Play(database)
        self.database = database
        self.other = self.play.add_worker("host-b")
        self.job_id = self.play.submit(recipes=["none"], formats=["tflite"])

    def claim(self) -> Claim:
        claim = self.play.claim("fetch")
        assert claim is not None
        return claim

    def is_free(self) -> bool:
        return claims.due_classes(self.database) == ["fetch"]

    def check_end(self) -> None:
        """Whatever the clock does: the job ends, and nobody has written who might not."""
        self.play.run_all()
        assert self.play.job(self.job_id)["state"] == "succeeded"
        assert find_stale_writes(read_ledger(self.database)) == []


@pytest.fixture
def bench(database: Database) -> Bench:
    return Bench(database)


def test_a_clock_that_goes_forward_ends_every_lease_and_no_step_is_done_twice(bench: Bench) -> None:
    held = bench.claim()
    bench.clock.pass_time(hours=1)
    heir = bench.play.claim("fetch", worker_id=bench.other)
    assert heir is not None
    assert (heir.step_id, heir.token) == (held.step_id, 2)
    with pytest.raises(LeaseLost):
        bench.play.finish(held)
    bench.play.finish(heir)
    bench.check_end()


def test_a_holder_that_nobody_overtook_keeps_its_step_over_a_jump(bench: Bench) -> None:
    held = bench.claim()
    bench.clock.pass_time(hours=1)
    claims.extend_lease(bench.database, held, POLICY.lease_s)
    assert not bench.is_free()
    bench.play.finish(held)
    bench.check_end()


@pytest.mark.parametrize("mends", [True, False])
def test_a_clock_that_goes_back_delays_recovery_by_a_lease_and_not_by_the_jump(bench: Bench, mends: bool) -> None:
    """Control: without the sweep's look at leases, a dead worker holds its step until the clock is there again."""
    bench.claim()
    bench.clock.pass_time(hours=-5)
    if mends:
        claims.shorten_leases(bench.database, POLICY)
    assert not bench.is_free(), "its worker may live"
    bench.clock.pass_time(seconds=POLICY.lease_s + 1)
    assert bench.is_free() == mends
    if mends:
        bench.check_end()


def test_a_live_worker_keeps_its_step_when_the_clock_goes_back(bench: Bench) -> None:
    held = bench.claim()
    bench.clock.pass_time(hours=-5)
    claims.shorten_leases(bench.database, POLICY)
    for _ in range(10):
        bench.clock.pass_time(seconds=5)
        claims.extend_lease(bench.database, held, POLICY.lease_s)
        claims.shorten_leases(bench.database, POLICY)
        assert not bench.is_free()
    bench.play.finish(held)
    bench.check_end()


@pytest.mark.parametrize("jump_s", [-86400.0, 86400.0])
def test_the_hosts_clock_moves_no_lease(bench: Bench, monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    held = bench.claim()
    tell = time.time
    monkeypatch.setattr(time, "time", lambda: tell() + jump_s)
    assert not bench.is_free()
    assert bench.play.claim("fetch", worker_id=bench.other) is None
    claims.extend_lease(bench.database, held, POLICY.lease_s)
    bench.play.finish(held, outputs=outputs_of(held))
    bench.check_end()
