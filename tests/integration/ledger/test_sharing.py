"""Steps shared between jobs: joining, cancelling, retrying, and two things that happen at one instant."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import func, select

from service.errors import BlobMissing, CheckpointInvalid, Conflict, IdempotencyMismatch, InvalidRequest, NotFound
from service.ledger import claims, jobs, locks, moves, results, views
from service.ledger.database import Database
from service.ledger.idempotency import Submission
from service.ledger.tables import Job, Step
from service.requests import parse_request
from tests.ledger_play import TENANT, Play

#: How long a transaction waits inside for a rival that is locked out and does not come.
_LOCKED_OUT_S = 1.0
#: The same for a rival that nothing holds back.
_FREE_S = 60.0


@pytest.fixture
def play(database: Database) -> Play:
    return Play(database)


def advance_to_shared_work(play: Play, count: int) -> None:
    """Finish the first steps of `count` jobs, so that all share what follows."""
    while (claim := play.claim("fetch", "light")) is not None and claim.kind in ("resolve", "fetch", "plan"):
        play.finish(claim)
    if claim is not None:
        claims.release_step(play.database, claim)


# --- cancelling ---------------------------------------------------------------------------------


def test_cancelling_one_of_two_jobs_leaves_their_shared_work_running(play: Play) -> None:
    first, second = play.submit(), play.submit()
    advance_to_shared_work(play, 2)
    claim = play.claim("convert")
    assert claim
    assert jobs.cancel_job(play.database, TENANT, first)
    assert claims.is_held(play.database, claim)
    assert play.job(first)["state"] == "cancelled"
    play.finish(claim)
    play.run_all()
    assert play.job(second)["state"] == "succeeded"
    assert play.job(first)["state"] == "cancelled"


def test_cancelling_the_last_job_stops_the_work(play: Play) -> None:
    first, second = play.submit(), play.submit()
    advance_to_shared_work(play, 2)
    claim = play.claim("convert")
    assert claim
    jobs.cancel_job(play.database, TENANT, first)
    jobs.cancel_job(play.database, TENANT, second)
    assert not claims.is_held(play.database, claim)
    assert play.claim() is None
    assert play.step_states(second)["quantize"] == ["cancelled", "cancelled"]


def test_cancelling_twice_is_no_error_and_ended_jobs_refuse(play: Play) -> None:
    job_id = play.submit()
    assert jobs.cancel_job(play.database, TENANT, job_id)
    assert not jobs.cancel_job(play.database, TENANT, job_id)
    other = play.submit()
    play.run_all()
    with pytest.raises(Conflict, match="already ended"):
        jobs.cancel_job(play.database, TENANT, other)


# --- failing and retrying -----------------------------------------------------------------------


def test_a_failure_ends_what_waits_for_it_and_names_the_root(play: Play) -> None:
    job_id = play.submit(formats=["tflite", "task"])
    claim = play.claim_kind("bundle")
    play.fail(claim, CheckpointInvalid("tokenizer.json is damaged.", file="tokenizer.json"))
    play.run_all()
    job = play.job(job_id)
    assert job["state"] == "partial"
    assert sorted(variant["state"] for variant in job["variants"]) == ["failed", "succeeded"]
    (failed,) = [variant for variant in job["variants"] if variant["state"] == "failed"]
    assert failed["error"]["code"] == "checkpoint_invalid"
    waiting = [step for step in job["steps"] if step["state"] == "cancelled"]
    assert {step["error"]["details"]["root_step_id"] for step in waiting} == {claim.step_id}


def test_a_failed_step_is_never_joined(play: Play) -> None:
    play.submit()
    claim = play.claim_kind("convert")
    play.fail(claim, CheckpointInvalid("Unreadable."))
    play.run_all()
    job_id = play.submit()
    play.run_all()
    assert play.job(job_id)["state"] == "succeeded"


def test_a_retry_keeps_what_succeeded(play: Play) -> None:
    job_id = play.submit()
    claim = play.claim_kind("quantize")
    play.fail(claim, CheckpointInvalid("Unreadable."))
    play.run_all()
    assert play.job(job_id)["state"] == "partial"
    published = [variant["name"] for variant in play.job(job_id)["variants"] if variant["state"] == "succeeded"]
    jobs.retry_job(play.database, TENANT, job_id)
    job = play.job(job_id)
    assert not job["is_final"]
    assert sorted(variant["state"] for variant in job["variants"]) == ["running", "succeeded"]
    kinds = play.run_all()
    assert sorted(kinds) == ["bundle", "plan", "publish", "quantize", "verify", "verify"]
    job = play.job(job_id)
    assert job["state"] == "succeeded"
    assert len(published) == 1
    assert all(step["state"] == "succeeded" for step in job["steps"])
    # The log of what failed is still there.
    assert "failed" in {entry["state"] for entry in views.list_logs(play.database, TENANT, job_id)}


def test_a_retry_after_a_bad_checkpoint_looks_at_the_source_again(play: Play) -> None:
    job_id = play.submit()
    play.fail(play.claim_kind("plan"), CheckpointInvalid("No tokenizer."))
    assert play.job(job_id)["state"] == "failed"
    jobs.retry_job(play.database, TENANT, job_id)
    assert play.run_all()[0] == "resolve"
    assert play.job(job_id)["state"] == "succeeded"


def test_a_retry_without_the_checkpoints_files_fetches_them_again(play: Play) -> None:
    job_id = play.submit()
    fetch = play.claim_kind("fetch")
    play.finish(fetch)
    play.fail(play.claim_kind("convert"), BlobMissing("The store lost model.safetensors."))
    play.run_all()
    results.retire_step(play.database, fetch.step_id)
    jobs.retry_job(play.database, TENANT, job_id)
    assert play.run_all()[:3] == ["resolve", "fetch", "plan"]
    assert play.job(job_id)["state"] == "succeeded"


def test_only_ended_and_unsuccessful_jobs_are_retried(play: Play) -> None:
    job_id = play.submit()
    with pytest.raises(Conflict, match="only an ended job"):
        jobs.retry_job(play.database, TENANT, job_id)
    play.run_all()
    with pytest.raises(Conflict, match="nothing to retry"):
        jobs.retry_job(play.database, TENANT, job_id)


def test_a_step_whose_blobs_are_gone_is_made_again(play: Play) -> None:
    play.submit()
    claim = play.claim_kind("convert")
    play.finish(claim)
    play.run_all()
    results.retire_step(play.database, claim.step_id)
    job_id = play.submit()
    assert "convert" in play.run_all()
    assert play.job(job_id)["state"] == "succeeded"


# --- submitting ---------------------------------------------------------------------------------


def test_one_idempotency_key_makes_one_job_however_many_ask_at_once(play: Play) -> None:
    request = parse_request({"source": {"kind": "folder", "path": "/models/tiny"}})

    def submit(_: int) -> Submission:
        return jobs.submit_job(play.database, TENANT, request, max_variants=9, idempotency_key="k")

    with ThreadPoolExecutor(8) as pool:
        submissions = list(pool.map(submit, range(8)))
    assert len({submission.job_id for submission in submissions}) == 1
    assert sum(submission.is_new for submission in submissions) == 1
    assert count(play.database, Job.id) == 1


def test_an_idempotency_key_belongs_to_one_request(play: Play) -> None:
    first, second = (parse_request({"source": {"kind": "folder", "path": path}}) for path in ("/a", "/b"))
    jobs.submit_job(play.database, TENANT, first, max_variants=9, idempotency_key="k")
    with pytest.raises(IdempotencyMismatch):
        jobs.submit_job(play.database, TENANT, second, max_variants=9, idempotency_key="k")
    assert count(play.database, Job.id) == 1


def test_too_large_a_matrix_stores_nothing(play: Play) -> None:
    request = parse_request({"source": {"kind": "folder", "path": "/a"}, "recipes": ["none", "float16"]})
    with pytest.raises(InvalidRequest, match="2 variants"):
        jobs.submit_job(play.database, TENANT, request, max_variants=1, idempotency_key="k")
    assert count(play.database, Job.id) == 0


# --- tenants ------------------------------------------------------------------------------------


def test_tenants_share_nothing_and_see_nothing(play: Play) -> None:
    job_id = play.submit()
    play.run_all()
    stranger = Play(play.database, "stranger")
    for look in (views.read_job, views.list_logs, views.list_artifacts, jobs.cancel_job, jobs.retry_job):
        with pytest.raises(NotFound):
            look(play.database, "stranger", job_id)
    with pytest.raises(NotFound):
        views.read_events(play.database, "stranger", job_id, after=0)
    assert views.list_jobs(play.database, "stranger") == []
    theirs = stranger.submit()
    assert "convert" in stranger.run_all()
    assert not any(step["reused"] for step in stranger.job(theirs)["steps"])


# --- at one instant -----------------------------------------------------------------------------


def finish_two_inputs_at_once(play: Play, monkeypatch: pytest.MonkeyPatch, rendezvous_s: float) -> list[str]:
    """Finish `reference` and `quantize`, the last two inputs of a `verify`, in overlapping transactions.

    Each transaction, having marked its own step, waits for the other to have done so before it looks for
    dependents to promote; a rival that is locked out never comes and the wait ends. Returns the states of
    `verify`.
    """
    job_id = play.submit(recipes=["none"], formats=["tflite"])
    advance_to_shared_work(play, 1)
    play.finish(play.claim_kind_only("convert"))
    claims = [play.claim_kind_only("reference"), play.claim_kind_only("quantize")]
    meeting = threading.Barrier(2)
    promote = moves._promote_dependents

    def meet() -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait(rendezvous_s)

    def promote_together(*args: Any) -> None:
        meet()
        promote(*args)
        # Nobody commits before both have looked.
        meet()

    monkeypatch.setattr(moves, "_promote_dependents", promote_together)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(play.finish, claims))
    return play.step_states(job_id)["verify"]


def test_two_inputs_that_finish_at_one_instant_strand_nothing(
    postgres_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finish_two_inputs_at_once(Play(postgres_database), monkeypatch, _LOCKED_OUT_S) == ["queued"]


def test_control_without_the_locks_the_dependent_is_stranded(
    postgres_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    play = Play(postgres_database)
    ignore: Callable[..., None] = lambda *_: None  # noqa: E731 - a no-op that takes anything
    monkeypatch.setattr(locks, "lock_linked_jobs", ignore)
    monkeypatch.setattr(locks, "lock_steps", ignore)
    # Without row locks the job's counters would serialise the two as well; leave them out.
    monkeypatch.setattr(moves, "announce", ignore)
    monkeypatch.setattr(moves, "recompute_job", ignore)
    assert finish_two_inputs_at_once(play, monkeypatch, _FREE_S) == ["waiting"]


def test_plans_that_finish_together_make_shared_steps_once(play: Play) -> None:
    job_ids = [play.submit() for _ in range(4)]
    plans: list[claims.Claim] = []
    workers = [play.add_worker(f"host-{number}") for number in range(4)]
    while (claim := play.claim("fetch")) is not None:
        play.finish(claim)
    for worker_id in workers:
        claim = play.claim("light", worker_id=worker_id)
        assert claim
        assert claim.kind == "plan"
        plans.append(claim)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(play.finish, plans))
    play.run_all()
    assert [play.job(job_id)["state"] for job_id in job_ids] == ["succeeded"] * 4
    by_kind = dict(
        play.database.read(
            lambda connection: connection.execute(select(Step.kind, func.count()).group_by(Step.kind)).all()
        )
    )
    assert {kind: by_kind[kind] for kind in ("fetch", "reference", "convert", "quantize", "verify")} == {
        "fetch": 1,
        "reference": 1,
        "convert": 1,
        "quantize": 2,
        "verify": 4,
    }


def test_a_job_that_joins_a_step_in_the_instant_it_finishes_is_not_stranded(play: Play) -> None:
    """Many rounds of a plan that joins `convert` against the finish of that `convert`."""
    for number in range(4):
        path = f"/models/{number}"
        first = play.submit(path, recipes=["none"])
        advance_to_shared_work(play, 1)
        convert = play.claim_kind_only("convert")
        second = play.submit(path, recipes=["dynamic_int8"])
        while (plan := play.claim("fetch")) is not None:
            play.finish(plan)
        plan = play.claim_kind_only("plan")
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(play.finish, [plan, convert]))
        play.run_all()
        assert [play.job(job_id)["state"] for job_id in (first, second)] == ["succeeded", "succeeded"]


def count(database: Database, column: Any) -> int:
    return database.read(lambda connection: connection.execute(select(func.count(column))).scalar_one())
