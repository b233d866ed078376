"""The migrations and the tables tell the same schema."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect, select

from service.ledger.base import Base
from service.ledger.database import Database, migrate
from service.ledger.tables import Blob, StepOutput


def test_migrations_make_the_tables_that_the_code_knows(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []


def test_a_missing_column_would_be_seen(database: Database) -> None:
    """Control: the comparison is not blind."""
    with database.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE events DROP COLUMN created_at")
    with database.engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Base.metadata)
    assert [difference[0] for difference in differences] == ["add_column"]


def test_checks_and_partial_indexes_are_in_the_database(database: Database) -> None:
    """What the comparison does not look at."""
    schema = inspect(database.engine)
    checks = {str(check["name"]) for table in schema.get_table_names() for check in schema.get_check_constraints(table)}
    assert {"ck_jobs_finalized", "ck_variants_finalized", "ck_steps_finalized", "ck_steps_leased"} <= checks
    indexes = {str(index["name"]): index for index in schema.get_indexes("steps")}
    assert indexes["uq_steps_shared_key"]["unique"]
    assert "retired_at" in read_condition(indexes["uq_steps_shared_key"])
    assert "queued" in read_condition(indexes["ix_steps_queue"])


def test_work_that_an_older_version_left_is_kept(tmp_path: Path) -> None:
    """SQLite makes a table anew to add a constraint; what refers to it must not notice."""
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    migrate(url, "0001")
    instant = "2026-01-31 12:00:00.000"
    with create_engine(url).begin() as connection:
        connection.exec_driver_sql("INSERT INTO tenants VALUES ('t', ?)", (instant,))
        connection.exec_driver_sql("INSERT INTO blobs VALUES ('d', 1, ?, NULL)", (instant,))
        step = {"id": "s", "tenant_id": "t", "kind": "convert", "key": "k", "shared": 1, "params": "{}", "token": 1}
        step |= {"resource_class": "convert", "state": "succeeded", "priority": 0, "failure_count": 0, "loss_count": 0}
        step |= {"toolchain_id": "", "revision": "", "created_at": instant, "finalized_at": instant}
        connection.exec_driver_sql(
            f"INSERT INTO steps ({', '.join(step)}) VALUES ({', '.join('?' * len(step))})", tuple(step.values())
        )
        connection.exec_driver_sql("INSERT INTO step_outputs VALUES ('s', 'model.tflite', 'd', 1)")
    migrate(url)
    database = Database(url)
    with database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
        joined = select(Blob.size_bytes, Blob.swept_at).join(StepOutput, StepOutput.digest == Blob.digest)
        assert connection.execute(joined).all() == [(1, None)]
    database.close()


def read_condition(index: Any) -> str:
    """The WHERE of a partial index."""
    return " ".join(str(value) for value in index["dialect_options"].values())


def test_processes_that_start_together_migrate_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new' / 'ledger.db'}"
    # Alembic's context is one a process, and so are ours.
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        list(pool.map(migrate, [url] * 3))
    database = Database(url)
    assert "steps" in inspect(database.engine).get_table_names()
    database.close()
