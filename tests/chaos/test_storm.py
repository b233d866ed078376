"""Jobs under a storm of kills on PostgreSQL, Redis and S3: every one ends as it must, and is published once."""

from __future__ import annotations

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
_WORKERS = 4 if _IS_LONG else 3
#: The short form would be over before its servers were hit by the clock of the long one; and where workers take long to
#: start, nobody would be left to work.
_WEATHER = Weather() if _IS_LONG else Weather(worker_every_s=2, redis_every_s=7, postgres_every_s=12, flush_after_s=9)
#: A storm whose jobs do not end fails; none passes because of this.
_PATIENCE_S = 180 + 10 * scale.JOBS
#: How long the control is watched after the last lease has run out. No time could change the outcome.
_WATCHED_S = 3.0

Servers = tuple[Postgres, Redis, dict[str, str]]


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with running(Postgres) as postgres, running(Redis) as broker, s3_server() as address:
        yield postgres, broker, address


def submit_all(made: Fleet, orders: list[Order]) -> dict[str, Order]:
    return {made.submit(order): order for order in orders}


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
        with storm.raging():
            ordered = submit_all(made, orders)
            wait_for(lambda: made.count_live() == 0 and storm.has_hit_all, "every job has ended", _PATIENCE_S)
        census = take_census(made.database, made.store, ordered)
        report(capsys, census, storm.hits, time.monotonic() - begun)
        assert len(ordered) == len(orders)
        assert {name: count for name, count in census.faults.items() if count} == {}, str(census)


def test_the_control_without_a_sweep_loses_jobs(servers: Servers, tmp_path: Path) -> None:
    """Workers that repair nothing, all killed once, and the messages gone: what was begun stays where it was."""
    orders = write_orders(tmp_path / "models", 4, scale.SEED)

    def count(statement: Any) -> int:
        return int(made.database.read(lambda connection: connection.execute(statement).scalar_one()))

    with fleet(tmp_path, *servers, workers=1, sweeps=False) as made:
        registered = select(func.count()).select_from(Worker)
        wait_for(lambda: count(registered) == 1, "a worker is there")
        ordered = submit_all(made, orders)
        wait_for(lambda: count(select(func.count()).where(Step.state == "running")), "a step runs")
        for process in made.processes:
            process.kill()
            process.wait()
        made.broker.flush()
        made.replace_dead()
        wait_for(lambda: count(registered) == 2, "another worker is there")
        wait_for(lambda: due_classes(made.database), "a lease has run out")
        time.sleep(_WATCHED_S)
        census = take_census(made.database, made.store, ordered)
        assert census.faults["lost"] > 0
        # Any message wakes it.
        wait_for(
            lambda: made.database.poke(due_classes(made.database)) or made.count_live() == 0, "every job has ended"
        )
        census = take_census(made.database, made.store, ordered)
        assert {name: count for name, count in census.faults.items() if count} == {}, str(census)
