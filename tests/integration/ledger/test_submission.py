"""A submission and housekeeping's turn, on both databases."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import update

from service.ledger import housekeeping, jobs, views
from service.ledger.clock import now
from service.ledger.database import Database
from service.ledger.tables import Chore
from service.requests import parse_request
from tests.ledger_play import TENANT, Play


@pytest.mark.parametrize("recipes", [["none"], ["none", "float16", "dynamic_int8"]])
def test_a_new_job_reads_in_its_answer_as_it_does_afterwards(database: Database, recipes: list[str]) -> None:
    Play(database)
    request = parse_request({"source": {"kind": "folder", "path": "/models/tiny"}, "recipes": recipes})
    submission = jobs.submit_job(database, TENANT, request, max_variants=9)
    assert submission.document
    assert submission.document == views.read_job(database, TENANT, submission.job_id)
    events = views.read_events(database, TENANT, submission.job_id, 0)["events"]
    assert [(event["number"], event["kind"]) for event in events] == [(1, "job"), (2, "step")]


def test_one_worker_is_told_that_a_chore_is_due(database: Database) -> None:
    def take() -> bool:
        return housekeeping.take_chore(database, "prune", 600)

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(lambda _: take(), range(4))) == [False, False, False, True]
    assert not take()
    database.write(lambda tx: tx.connection.execute(update(Chore).values(begun_at=now(-601))))
    assert take()
    assert not take()
