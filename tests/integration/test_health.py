"""`edgekiln health` on a worker and a beat that are well, silent or absent; the API's is in the acceptance tests."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from typer.testing import CliRunner

from service.cli import app
from service.ledger import fleet
from service.ledger.clock import now
from service.ledger.database import Database
from service.ledger.keys import Toolchain
from service.ledger.tables import Worker


def check(part: str) -> tuple[int, dict[str, Any]]:
    """Return exit code and document."""
    result = CliRunner().invoke(app, ["health", part, "--json"])
    document: dict[str, Any] = json.loads(result.stdout)
    return result.exit_code, document


@pytest.fixture
def worker_id(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A worker that has just registered, and has told its id."""
    worker_id = fleet.register_worker(
        database,
        "here",
        cores=1,
        memory_bytes=1,
        memory_limit_bytes=1,
        slots={"light": 1},
        toolchain=Toolchain(versions={}, revisions={}),
        isolation={},
    )
    (tmp_path / "worker").write_text(f"{worker_id}\n")
    monkeypatch.setenv("EDGEKILN_DATABASE_URL", database.url)
    monkeypatch.setenv("EDGEKILN_WORKER_FILE", str(tmp_path / "worker"))
    return worker_id


def test_a_worker_is_well_while_the_ledger_hears_of_it(database: Database, worker_id: str) -> None:
    code, document = check("worker")
    assert (code, document["worker"]) == (0, worker_id)

    silent = update(Worker).values(heartbeat_at=now(-fleet.WORKER_SILENCE_S - 1))
    database.write(lambda tx: tx.connection.execute(silent))
    code, document = check("worker")
    assert (code, document["code"]) == (1, "service_unavailable")

    fleet.beat_worker(database, worker_id)
    assert check("worker")[0] == 0


def test_another_worker_s_heartbeat_does_not_count(database: Database, worker_id: str, tmp_path: Path) -> None:
    (tmp_path / "worker").write_text("worker_of_before\n")
    assert check("worker")[0] == 1


def test_a_worker_that_has_not_told_its_id_is_not_well(
    database: Database, worker_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker").unlink()
    assert check("worker")[0] == 1
    monkeypatch.delenv("EDGEKILN_WORKER_FILE")
    code, document = check("worker")
    assert (code, document["code"]) == (2, "invalid_settings")


def test_a_beat_is_well_while_it_writes_its_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKILN_DATA_DIR", str(tmp_path))
    assert check("beat")[0] == 1
    schedule = tmp_path / "beat-schedule.db"
    schedule.touch()
    assert check("beat")[0] == 0
    an_hour_ago = time.time() - 3600
    os.utime(schedule, (an_hour_ago, an_hour_ago))
    assert check("beat")[0] == 1
