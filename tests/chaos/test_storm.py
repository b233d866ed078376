"""Jobs under a storm of kills on PostgreSQL, Redis and S3: every one ends as it must, and is published once."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from service.ledger.claims import due_classes
from service.ledger.tables import Step, Worker
from tests.chaos import scale
from tests.chaos.census import Census, take_census
from tests.chaos.orders import Order, write_orders
from tests.chaos.servers import Postgres, Redis, running, s3_server
from tests.chaos.storm import Fleet, Storm, Weather, fleet
from tests.kiln import wait_for

_IS_LONG = scale.JOBS >= 100
_WORKERS = 5 if _IS_LONG else 3
#: How many jobs are under way at a time: enough that no worker waits for work.
_LIVE_JOBS = 40
#: The short form would be over before its servers were hit by the clock of the long one; and where workers take long to
#: start, nobody would be left to work.
_WEATHER = Weather() if _IS_LONG else Weather(worker_every_s=2, redis_every_s=7, postgres_every_s=12, flush_after_s=9)
#: A storm whose jobs do not end fails; none passes because of this.
_PATIENCE_S = 180 + 10 * scale.JOBS
_TOLD_EVERY_S = 60.0
#: How long the control is watched after the last lease has run out. No time could change the outcome.
_WATCHED_S = 3.0

Servers = tuple[Postgres, Redis, dict[str, str]]


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with running(Postgres) as postgres, running(Redis) as broker, s3_server() as address:
        yield postgres, broker, address


def submit_all(made: Fleet, orders: list[Order]) -> dict[str, Order]:
    return {made.submit(order): order for order in orders}


def bring_to_end(made: Fleet, orders: list[Order], storm: Storm) -> dict[str, Order]:
    """Submit as jobs end, until all are submitted or the time is up; return when all that were have ended."""
    ordered: dict[str, Order] = {}
    waiting = iter(orders)
    begun = told_at = time.monotonic()
    while True:
        live, now = made.count_live(), time.monotonic()
        is_over = bool(scale.STORM_MIN) and now > begun + scale.STORM_MIN * 60
        while live is not None and live < _LIVE_JOBS and not is_over and (order := next(waiting, None)):
            ordered[made.submit(order)] = order
            live += 1
        if live == 0 and storm.has_hit_all:
            return ordered
        assert now < begun + _PATIENCE_S, f"{live} of {len(ordered)} jobs have not ended"
        if now > told_at + _TOLD_EVERY_S:
            told_at = now
            print(
                f"{now - begun:6.0f} s: {len(ordered)} jobs submitted, {live} under way; {dict(storm.hits)}", flush=True
            )
        time.sleep(0.2)


def poke_until_all_have_ended(made: Fleet) -> None:
    """Do what nobody else does in the control: any message wakes a worker."""
    poked_at = 0.0

    def have_ended() -> bool:
        nonlocal poked_at
        if time.monotonic() > poked_at + 1:
            poked_at = time.monotonic()
            made.database.poke(due_classes(made.database))
        return made.count_live() == 0

    wait_for(have_ended, "every job has ended")


def report(capsys: pytest.CaptureFixture[str], census: Census, hits: Any, seconds: float) -> None:
    with capsys.disabled():
        print(f"\nstorm of {seconds:.0f} s, seed {scale.SEED}: {dict(hits)}\n{census}")


def test_every_job_ends_as_it_must_under_a_storm(
    servers: Servers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    orders = write_orders(tmp_path / "models", scale.JOBS, scale.SEED)
    begun = time.monotonic()
    with fleet(tmp_path, *servers, workers=_WORKERS) as made:
        storm = Storm(made, _WEATHER, scale.SEED)
        with storm.raging(), capsys.disabled():
            ordered = bring_to_end(made, orders, storm)
        census = take_census(made.database, made.store, ordered)
        report(capsys, census, storm.hits, time.monotonic() - begun)
        assert len(ordered) == len(orders) or scale.STORM_MIN
        assert {name: count for name, count in census.faults.items() if count} == {}, str(census)


def test_a_worker_that_starts_while_the_ledger_is_away_waits_for_it(servers: Servers, tmp_path: Path) -> None:
    """It must not pass for alive without a task, and take others' messages."""
    with fleet(tmp_path, *servers, workers=0) as made:
        made.postgres.kill()
        made.start_worker()
        log = tmp_path / "worker.log"
        wait_for(lambda: "does not answer yet" in log.read_text(), "the worker has found nobody")
        made.postgres.start()
        (ordered,) = submit_all(made, write_orders(tmp_path / "models", 1, scale.SEED))
        wait_for(lambda: made.count_live() == 0, f"{ordered} has ended")


def test_the_control_without_a_sweep_loses_jobs(servers: Servers, tmp_path: Path) -> None:
    """Workers that repair nothing, all killed once, and the messages gone: what was begun stays where it was."""
    orders = write_orders(tmp_path / "models", 4, scale.SEED)

    def count(statement: Any) -> int:
        return int(made.database.read(lambda connection: connection.execute(statement).scalar_one()))

    with fleet(tmp_path, *servers, workers=1, sweeps=False, lease_s=2, heartbeat_s=1) as made:
        registered = select(func.count()).select_from(Worker)
        wait_for(lambda: count(registered) == 1, "a worker is there")
        ordered = submit_all(made, orders)
        wait_for(lambda: count(select(func.count()).where(Step.state == "running")), "a step runs")
        for process in made.processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
        made.broker.flush()
        made.replace_dead()
        wait_for(lambda: count(registered) == 2, "another worker is there")
        wait_for(lambda: due_classes(made.database), "a lease has run out")
        time.sleep(_WATCHED_S)
        census = take_census(made.database, made.store, ordered)
        assert census.faults["lost"] > 0
        poke_until_all_have_ended(made)
        census = take_census(made.database, made.store, ordered)
        assert {name: count for name, count in census.faults.items() if count} == {}, str(census)
