"""Connections to PostgreSQL never wait for ever."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url

from service.ledger.database import Database


def read_settings(database: Database) -> dict[str, Any]:
    statement = text("SELECT name, setting FROM pg_settings WHERE name LIKE '%_timeout' AND source = 'client'")
    return database.read(lambda connection: {row.name: int(row.setting) for row in connection.execute(statement)})


def test_locks_and_statements_have_an_end(postgres_database: Database) -> None:
    assert read_settings(postgres_database) == {
        "lock_timeout": 10_000,
        "statement_timeout": 60_000,
        "idle_in_transaction_session_timeout": 10_000,
    }


def test_a_server_that_vanishes_is_noticed(postgres_database: Database) -> None:
    with postgres_database.engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        parameters = driver.info.get_parameters()
    assert {name: parameters[name] for name in ("connect_timeout", "tcp_user_timeout", "keepalives_idle")} == {
        "connect_timeout": "10",
        "tcp_user_timeout": "10000",
        "keepalives_idle": "10",
    }


def test_what_the_url_says_wins(postgres_ledger_url: str) -> None:
    url = make_url(postgres_ledger_url).update_query_dict({"options": "-c statement_timeout=5s"})
    database = Database(url.render_as_string(hide_password=False))
    assert read_settings(database) == {"statement_timeout": 5_000}
    database.close()


def test_a_transaction_that_was_frozen_holds_nobody_up_and_is_repeated(postgres_ledger_url: str) -> None:
    """A process that is stopped between two statements: PostgreSQL ends its session, and the rest is as usual."""
    url = make_url(postgres_ledger_url).update_query_dict({"options": "-c idle_in_transaction_session_timeout=100ms"})
    database, other = Database(url.render_as_string(hide_password=False)), Database(postgres_ledger_url)
    lock = text("SELECT pg_advisory_xact_lock(1)")
    tries = []

    def work(connection: Connection) -> int:
        tries.append(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())
        connection.execute(lock)
        if len(tries) == 1:
            # Nobody else would get it, had this session not been ended.
            other.write(lambda tx: tx.connection.execute(lock))
        return int(connection.execute(text("SELECT 7")).scalar_one())

    assert database.write(lambda tx: work(tx.connection)) == 7
    tries.clear()
    assert database.read(work) == 7
    assert len(set(tries)) == 2
    database.close()
    other.close()
