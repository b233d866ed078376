"""The worker process's own thread: the sweep goes on, whatever it meets."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
from sqlalchemy import select, update

from service.ledger import jobs
from service.ledger.clock import now
from service.ledger.database import Database
from service.ledger.tables import IdempotencyKey
from service.requests import parse_request
from service.settings import load_settings
from tests.kiln import wait_for
from tests.ledger_play import TENANT, TOOLCHAIN, Play
from workers.process import WorkerProcess

PATIENCE_S = 30.0


def test_the_sweep_outlives_errors_that_nobody_foresaw(
    tmp_path: Path, sqlite_ledger_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(sqlite_ledger_url)
    Play(database).submit()
    database.close()
    pokes: list[list[str]] = []
    has_gone_on = threading.Event()

    def poke(classes: Iterable[str]) -> None:
        pokes.append(list(classes))
        if len(pokes) < 3:
            raise RuntimeError("nobody foresaw this")
        has_gone_on.set()

    settings = load_settings({"data_dir": tmp_path, "database_url": sqlite_ledger_url, "sweep_s": 0.01})
    process = WorkerProcess(settings, poke, TOOLCHAIN)
    try:
        process.start()
        assert has_gone_on.wait(PATIENCE_S)
    finally:
        process.close()
    assert pokes[:3] == [["fetch"]] * 3
    assert "the sweep failed" in caplog.text


def test_housekeeping_needs_neither_a_message_nor_a_slot(tmp_path: Path, sqlite_ledger_url: str) -> None:
    database = Database(sqlite_ledger_url)
    Play(database)
    request = parse_request({"source": {"kind": "folder", "path": "/models/tiny"}})
    jobs.submit_job(database, TENANT, request, max_variants=9, idempotency_key="of last week")
    aged = update(IdempotencyKey).values(created_at=now(-8 * 24 * 3600))
    database.write(lambda tx: tx.connection.execute(aged))
    slots = dict.fromkeys(("fetch_slots", "convert_slots", "light_slots", "device_slots"), 0)
    settings = load_settings({"data_dir": tmp_path, "database_url": sqlite_ledger_url, **slots})
    process = WorkerProcess(settings, lambda _: None, TOOLCHAIN)

    def is_forgotten() -> bool:
        keys = select(IdempotencyKey.key)
        return database.read(lambda connection: connection.execute(keys).first()) is None

    assert not is_forgotten()
    try:
        process.start()
        wait_for(is_forgotten, "the old key is forgotten")
    finally:
        process.close()
        database.close()
