"""Retention: which jobs go with what they made, which stay, and that nobody else loses anything."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from service.errors import CheckpointInvalid, Conflict, NotFound
from service.ledger import access, jobs, locks, schedules, sweep, uploads, views
from service.ledger.base import Base
from service.ledger.database import Database, Transaction
from service.ledger.sweep import Retention
from service.ledger.tables import Attempt, Blob, Job, Publication, Step, StepOutput
from service.schedules import ScheduleRequest
from service.storage.folder import FolderStore
from service.sweep import Finding, sweep_store
from tests.api_world import StoredPlay
from tests.ledger_play import TENANT

#: Everything that was ever kept for reuse, and every job that ended.
ALL = Retention(outputs_s=0, uploads_s=0, unpublished_jobs_s=0, published_jobs_s=0, wait_s=0)
#: Files that are only kept for reuse; jobs stay.
FILES = Retention(outputs_s=0, uploads_s=0, unpublished_jobs_s=math.inf, published_jobs_s=math.inf, wait_s=0)
LONG_S = 3600.0


class Bench:
    """A ledger, a store, a worker, and the sweep."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.store = FolderStore(folder / "store")
        self.play = StoredPlay(database, self.store)

    def sweep(self, retention: Retention = ALL, dry_run: bool = False) -> list[Finding]:
        return list(sweep_store(self.database, self.store, retention, dry_run=dry_run))

    def finish_job(self, **fields: Any) -> str:
        job_id = self.play.submit(**fields)
        self.play.run_all()
        assert self.play.job(job_id)["state"] == "succeeded"
        return job_id

    def fail_job(self, **fields: Any) -> str:
        job_id = self.play.submit(**fields)
        self.play.fail(self.play.claim_kind("convert"), CheckpointInvalid("No."))
        self.play.run_all()
        assert self.play.job(job_id)["state"] == "failed"
        return job_id

    def remove(self, job_id: str) -> None:
        jobs.remove_job(self.database, TENANT, job_id)

    def stored(self) -> set[str]:
        return {found.key.rpartition("/")[2] for found in self.store.list("blobs/")}

    def read(self, statement: Any) -> set[Any]:
        return self.database.read(lambda connection: set(connection.execute(statement).scalars()))

    def count(self, table: type[Base]) -> int:
        statement = select(func.count()).select_from(table)
        return int(self.database.read(lambda connection: connection.execute(statement).scalar_one()))

    def require_whole(self) -> None:
        """Whatever the ledger counts on is in the store."""
        kept = self.read(select(Blob.digest).where(Blob.condemned_at.is_(None)))
        assert kept <= self.stored()
        published = self.read(select(Publication.digest))
        usable = self.read(
            select(StepOutput.digest).join(Step, Step.id == StepOutput.step_id).where(Step.retired_at.is_(None))
        )
        logs = self.read(select(Attempt.log_digest).where(Attempt.log_digest.is_not(None)))
        assert published | usable | logs <= kept


@pytest.fixture
def bench(database: Database, tmp_path: Path) -> Bench:
    return Bench(database, tmp_path)


# --- by hand ------------------------------------------------------------------------------------


def test_an_ended_job_is_removed_with_all_that_only_it_needs(bench: Bench) -> None:
    job_id = bench.finish_job()
    bench.remove(job_id)
    with pytest.raises(NotFound):
        bench.play.job(job_id)
    assert bench.count(Publication) == 0
    bench.sweep(FILES)
    bench.sweep(FILES)
    assert bench.stored() == set()
    for table in (Step, Attempt, StepOutput):
        assert bench.count(table) == 0
    bench.finish_job()
    bench.require_whole()


def test_a_live_job_is_not_removed(bench: Bench) -> None:
    job_id = bench.play.submit()
    with pytest.raises(Conflict, match="edgekiln cancel"):
        bench.remove(job_id)
    jobs.cancel_job(bench.database, TENANT, job_id)
    bench.remove(job_id)
    with pytest.raises(NotFound):
        bench.remove(job_id)


def test_a_job_of_another_tenant_is_not_removed(bench: Bench) -> None:
    job_id = bench.finish_job()
    access.ensure_tenant(bench.database, "other")
    with pytest.raises(NotFound):
        jobs.remove_job(bench.database, "other", job_id)
    assert bench.play.job(job_id)["state"] == "succeeded"


def test_what_another_job_shares_stays_with_its_logs(bench: Bench) -> None:
    first = bench.finish_job()
    second = bench.finish_job()
    before = bench.play.job(second)
    logs = views.list_logs(bench.database, TENANT, second)
    bench.remove(first)
    bench.sweep(FILES)
    bench.sweep(FILES)
    assert bench.play.job(second) == before
    assert views.list_logs(bench.database, TENANT, second) == logs
    published = bench.read(select(Publication.digest))
    assert published
    bench.require_whole()


def test_what_is_still_good_for_reuse_stays_until_it_was_not_used_for_long(bench: Bench) -> None:
    bench.remove(bench.finish_job())
    patient = Retention(LONG_S, LONG_S, math.inf, math.inf, 0)
    bench.sweep(patient)
    bench.sweep(patient)
    bench.require_whole()
    bench.play.submit()
    assert "convert" not in bench.play.run_all(), "it was reused"


def test_a_removed_job_is_no_more_what_a_schedule_waits_for(bench: Bench) -> None:
    job = {"source": {"kind": "folder", "path": "/models/tiny"}}
    request = ScheduleRequest.model_validate({"name": "nightly", "every_s": 60, "job": job})
    schedule_id = schedules.add_schedule(bench.database, TENANT, request, max_variants=256)

    def fire_now(tx: Transaction) -> None:
        tx.connection.exec_driver_sql("UPDATE schedules SET next_at = created_at")

    bench.database.write(fire_now)
    (tick,) = schedules.fire_due(bench.database, lambda request: request, {}, max_variants=256)
    assert tick.job_id is not None
    bench.play.run_all()
    bench.remove(tick.job_id)
    (past,) = schedules.read_schedule(bench.database, TENANT, schedule_id)["ticks"]
    assert (past["outcome"], past["job_id"]) == ("submitted", None)


# --- by policy ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unpublished_s", "published_s", "removed"),
    [
        (math.inf, math.inf, set()),
        (LONG_S, LONG_S, set()),
        (0, math.inf, {"failed"}),
        (0, LONG_S, {"failed"}),
        (math.inf, 0, {"succeeded"}),
        (0, 0, {"failed", "succeeded"}),
    ],
)
def test_jobs_go_as_the_policies_say(bench: Bench, unpublished_s: float, published_s: float, removed: set[str]) -> None:
    ended = {"succeeded": bench.finish_job(), "failed": bench.fail_job(path="/models/other")}
    live = bench.play.submit(path="/models/third")
    retention = Retention(0, 0, unpublished_s, published_s, 0)
    findings = bench.sweep(retention)
    gone = {finding.digest for finding in findings if finding.fate == "removed"}
    assert gone == {ended[state] for state in removed}
    assert bench.read(select(Job.id)) == {live, *ended.values()} - gone
    bench.sweep(retention)
    bench.require_whole()
    assert (bench.count(Publication) > 0) == ("succeeded" not in removed)


def test_uploads_go_with_the_last_job_that_named_them(bench: Bench) -> None:
    file = bench.play.put("evaluation", b"{}")
    uploads.enter_upload(bench.database, TENANT, file, None)
    job_id = bench.finish_job(evaluation=file.digest)
    bench.sweep(FILES)
    bench.sweep(FILES)
    assert file.digest in bench.stored(), "control: the job names it"
    bench.remove(job_id)
    bench.sweep(FILES)
    bench.sweep(FILES)
    assert file.digest not in bench.stored()


def test_a_dry_run_promises_what_is_done_and_names_the_kinds(bench: Bench) -> None:
    bench.finish_job()
    bench.fail_job(path="/models/other", recipes=["float16"])
    kept = bench.play.submit(path="/models/third")
    bench.play.claim_kind("convert")
    before = bench.stored(), bench.read(select(Job.id))
    promised = bench.sweep(dry_run=True)
    assert (bench.stored(), bench.read(select(Job.id))) == before
    done = bench.sweep()
    assert sorted(map(str, promised)) == sorted(map(str, done))
    kinds = {finding.kind for finding in promised}
    assert {"job", "log", "fetch", "convert", "quantize", "bundle"} <= kinds
    assert bench.read(select(Job.id)) == {kept}
    bench.sweep()
    bench.require_whole()


# --- races --------------------------------------------------------------------------------------


def test_a_job_that_joins_while_another_is_removed_and_swept_loses_nothing(bench: Bench) -> None:
    first = bench.finish_job()
    second = bench.play.submit()
    plan = bench.play.claim_kind("plan")

    def remove_and_sweep() -> None:
        bench.remove(first)
        bench.sweep(FILES)

    with ThreadPoolExecutor(2) as pool:
        finished, removed = pool.submit(bench.play.finish, plan), pool.submit(remove_and_sweep)
        finished.result()
        removed.result()
    bench.sweep(FILES)
    bench.play.run_all()
    assert bench.play.job(second)["state"] == "succeeded"
    bench.require_whole()


def test_a_plan_that_has_joined_keeps_the_sweep_waiting(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep comes while the plan's transaction holds the steps that it has joined, before it commits."""
    first = bench.finish_job()
    second = bench.play.submit()
    plan = bench.play.claim_kind("plan")
    (joined,) = (step["id"] for step in bench.play.job(first)["steps"] if step["kind"] == "convert")
    lock_steps = locks.lock_steps
    swept = threading.Event()
    begun: list[Any] = []

    def remove_and_sweep() -> None:
        bench.remove(first)
        bench.sweep(FILES)

    def lock_then_let_come(tx: Transaction, step_ids: Any) -> None:
        ids = list(step_ids)
        lock_steps(tx, ids)
        if not begun and joined in ids and threading.current_thread() is threading.main_thread():
            begun.append(pool.submit(remove_and_sweep))
            begun[0].add_done_callback(lambda _: swept.set())
            assert not swept.wait(0.5), "the sweep did not wait"

    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr("service.ledger.graph.locks.lock_steps", lock_then_let_come)
        bench.play.finish(plan)
        monkeypatch.undo()
    assert begun
    begun[0].result()
    bench.sweep(FILES)
    bench.play.run_all()
    assert bench.play.job(second)["state"] == "succeeded"
    bench.require_whole()


def test_a_step_is_not_forgotten_before_its_last_holder_must_know(bench: Bench) -> None:
    job_id = bench.play.submit()
    bench.play.claim_kind("plan")
    jobs.cancel_job(bench.database, TENANT, job_id)
    bench.remove(job_id)
    assert sweep.forget_orphans(bench.database, LONG_S) == 0
    assert sweep.forget_orphans(bench.database, 0) > 0
    while sweep.forget_orphans(bench.database, 0):
        pass
    assert bench.read(select(Step.kind)) == {"fetch"}, "which is good for reuse"
