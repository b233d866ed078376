"""The distributed profile's parts under the same code: PostgreSQL keeps the ledger, Redis carries the messages."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from sqlalchemy import create_engine, insert, select

from service.ledger.base import Base
from tests.chaos.conftest import Fire
from tests.kiln import check_published_once, check_store, find_processes, wait_for
from tests.services import redis_url


@pytest.fixture
def broker_url() -> Iterator[str]:
    with redis_url() as url:
        yield url


def copy_ledger(source_url: str, target_url: str) -> None:
    """Copy every row of a ledger into an empty one of another database."""
    source, target = create_engine(source_url), create_engine(target_url)
    with source.connect() as reader, target.begin() as writer:
        for table in Base.metadata.sorted_tables:
            if rows := [dict(row) for row in reader.execute(select(table)).mappings()]:
                writer.execute(insert(table), rows)
    source.dispose()
    target.dispose()


def test_a_job_survives_its_worker_and_every_message_on_postgresql_and_redis(
    fire: Fire, converted: Path, checkpoint: Path, postgres_ledger_url: str, broker_url: str
) -> None:
    copy_ledger(f"sqlite:///{converted / 'data' / 'ledger.db'}", postgres_ledger_url)
    (converted / "data" / "ledger.db").unlink()
    kiln = fire(database_url=postgres_ledger_url, broker_url=broker_url)
    job_id = kiln.submit(checkpoint, recipes=["none", "dynamic_int8"], formats=["tflite", "litertlm"])
    # The first light step waits for its zygote's imports, and so does the kill not have to hurry.
    wait_for(lambda: (kiln.step(job_id, "plan") or {}).get("state") == "running", "plan runs")
    worker_pid = kiln.worker_pid
    assert worker_pid is not None

    os.kill(worker_pid, signal.SIGKILL)
    with redis.Redis.from_url(broker_url) as broker:
        broker.flushall()
    job = kiln.finished(job_id)

    assert job["state"] == "succeeded", job
    attempts = kiln.attempts(job_id)
    assert attempts.pop("plan") == ["lost", "succeeded"]
    assert {state for states in attempts.values() for state in states} == {"succeeded"}
    # What the copied ledger knew was not done again.
    assert "convert" not in attempts
    rows = check_published_once(kiln.database, kiln.data_dir / "store", job_id)
    assert len(rows) == 4
    check_store(kiln.data_dir / "store")
    assert len(kiln.client.download(job_id, kiln.folder / "out")) == 4
    assert not (kiln.data_dir / "ledger.db").exists()
    assert not any(path.is_file() for path in (kiln.data_dir / "broker").rglob("*"))
    kiln.stop()
    assert find_processes(kiln.folder) == {}
