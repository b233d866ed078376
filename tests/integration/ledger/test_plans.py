"""Plans: what workers and readers ask for is read from an index, whatever the number of jobs; not by the clock.

The statements are those that the ledger's doors really execute, explained by the database itself on a ledger of 1,000
jobs with fresh statistics.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event

from benchmarks.ledger_size import fill
from service.ledger import claims, history, views
from service.ledger.counts import read_counts
from service.ledger.database import Database
from tests.ledger_play import POLICY, TENANT, Play

#: Tables that grow with every job.
GROWING = ("jobs", "steps", "variants", "job_steps", "variant_steps", "step_inputs", "attempts", "events")

#: So few that a table of a thousand rows is not worth reading whole.
PAGE = 3


@pytest.fixture
def full(database: Database) -> Database:
    """A ledger in which reading a table whole would show."""
    fill(database, 1000)
    return database


@contextmanager
def recorded(database: Database) -> Iterator[list[tuple[str, Any]]]:
    """Yield the statements and parameters that are executed meanwhile."""
    found: list[tuple[str, Any]] = []

    def record(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        found.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", record)
    try:
        yield found
    finally:
        event.remove(database.engine, "before_cursor_execute", record)


def explain(database: Database, ask: Callable[[], object]) -> list[str]:
    """Return the lines of the plans of all that `ask` reads."""
    with recorded(database) as statements:
        ask()
    word = "EXPLAIN" if database.engine.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN"
    lines: list[str] = []
    with database.engine.connect() as connection:
        for statement, parameters in statements:
            if statement.startswith("SELECT"):
                rows = connection.exec_driver_sql(f"{word} {statement}", parameters)
                lines += [str(row[-1]).strip() for row in rows]
    return lines


def find_scans(lines: list[str]) -> list[str]:
    """Return the lines that read a growing table, or all its entries in an index."""
    tables = "|".join(GROWING)
    # SQLite says SCAN of an index that is read whole, too; this one holds what runs, and nothing else.
    whole = re.compile(rf"Seq Scan on ({tables})\b|^SCAN ({tables})\b(?! USING (COVERING )?INDEX ix_steps_running)")
    return [line for line in lines if whole.search(line)]


def claim_and_release(database: Database) -> None:
    play = Play(database, host="host-b")
    claim = play.claim("fetch")
    assert claim
    claims.release_step(database, claim)


def list_pages(database: Database) -> None:
    first = views.list_jobs(database, TENANT, limit=PAGE)
    assert len(views.list_jobs(database, TENANT, limit=PAGE, before=first[-1]["id"])) == PAGE


DOORS = {
    "claim": claim_and_release,
    "due": claims.due_classes,
    "hopeless": lambda database: claims.end_hopeless_steps(database, POLICY),
    "history": lambda database: history.list_history(database, TENANT, history.Filter(), PAGE),
    "list": list_pages,
    "list by state": lambda database: views.list_jobs(database, TENANT, states=["failed", "queued"], limit=PAGE),
}


def test_nothing_that_is_asked_often_reads_a_table_whole(full: Database) -> None:
    plans = {name: explain(full, lambda ask=ask: ask(full)) for name, ask in DOORS.items()}
    assert all(plans.values())
    assert {name: find_scans(lines) for name, lines in plans.items()} == {name: [] for name in DOORS}


def test_a_scrape_reads_what_is_unfinished_and_nothing_else(full: Database) -> None:
    # Of so few jobs, with a tenth of them unfinished, PostgreSQL reads the whole table, as is right.
    lines = [line for line in explain(full, lambda: read_counts(full)) if "Seq Scan on jobs" not in line]
    unfinished = ("ix_steps_queue", "ix_steps_waiting", "ix_steps_running", "ix_jobs_unfinished")
    assert [line for line in find_scans(lines) if not any(index in line for index in unfinished)] == []


def test_control_without_its_index_a_table_is_read_whole(full: Database) -> None:
    with full.engine.begin() as connection:
        for index in ("ix_steps_queue", "ix_jobs_tenant_created", "ix_jobs_tenant_state", "ix_jobs_unfinished"):
            connection.exec_driver_sql(f"DROP INDEX {index}")
    for door in ("claim", "due", "list"):
        assert find_scans(explain(full, lambda door=door: DOORS[door](full))), door
