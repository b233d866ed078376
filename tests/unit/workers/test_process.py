"""The worker process's own thread: the sweep goes on, whatever it meets."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import pytest

from service.ledger.database import Database
from service.settings import load_settings
from tests.ledger_play import TOOLCHAIN, Play
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
