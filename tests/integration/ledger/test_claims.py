"""Claim, lease, fence: who may run a step, and who may write about it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select, update

from service.errors import BenchmarkFailed, ChildCrashed, LeaseLost, SourceUnavailable, StoreUnavailable
from service.ledger import claims, moves, results, views
from service.ledger.blobs import OutputFile
from service.ledger.clock import now
from service.ledger.database import Database
from service.ledger.tables import Attempt, Step
from tests.ledger_play import BENCHMARK, EXPIRED, POLICY, TENANT, TOOLCHAIN, Play, figures_of, outputs_of


@pytest.fixture
def play(database: Database) -> Play:
    return Play(database)


def attempts(database: Database, step_id: str) -> list[str]:
    statement = select(Attempt.state).where(Attempt.step_id == step_id).order_by(Attempt.token)
    return list(database.read(lambda connection: connection.execute(statement).scalars()))


def test_a_job_runs_to_its_end(play: Play) -> None:
    job_id = play.submit(formats=["tflite", "litertlm"])
    kinds = play.run_all()
    job = play.job(job_id)
    assert job["state"] == "succeeded"
    assert [variant["state"] for variant in job["variants"]] == ["succeeded", "succeeded"]
    assert [variant["engine"] for variant in job["variants"]] == ["reauthored", "reauthored"]
    # One conversion and one reference, whatever the number of recipes.
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "resolve": 1,
        "fetch": 1,
        "plan": 1,
        "reference": 1,
        "convert": 1,
        "quantize": 2,
        "bundle": 2,
        "verify": 4,
        "publish": 2,
    }


def test_equal_work_is_done_once(play: Play) -> None:
    play.submit()
    play.run_all()
    job_id = play.submit(path="/models/tiny")
    assert sorted(play.run_all()) == ["plan", "publish", "publish", "resolve"]
    reused = {step["kind"] for step in play.job(job_id)["steps"] if step["reused"]}
    assert reused == {"fetch", "reference", "convert", "quantize", "bundle", "verify"}
    assert play.job(job_id)["state"] == "succeeded"


def test_urgent_work_comes_first_then_the_oldest(play: Play) -> None:
    first, second = play.submit("/models/a"), play.submit("/models/b")
    urgent = play.submit("/models/c", priority=5)
    claims = [play.claim("fetch", worker_id=play.add_worker(f"host-{number}")) for number in range(3)]
    assert [claim and claim.job_id for claim in claims] == [urgent, first, second]


def test_a_worker_claims_no_more_than_its_slots(play: Play) -> None:
    for number in range(3):
        play.submit(f"/models/{number}")
    worker_id = play.add_worker("host-b", {"fetch": 2})
    assert play.claim("fetch", worker_id=worker_id)
    second = play.claim("fetch", worker_id=worker_id)
    assert second
    assert play.claim("fetch", worker_id=worker_id) is None
    play.finish(second)
    assert play.claim("fetch", worker_id=worker_id)
    assert play.claim("convert", worker_id=worker_id) is None


def test_a_live_lease_is_nobody_elses(play: Play) -> None:
    play.submit()
    assert play.claim("fetch")
    assert play.claim("fetch", worker_id=play.add_worker("host-b")) is None


def test_an_expired_lease_passes_on_and_the_old_holder_writes_nothing(play: Play) -> None:
    job_id = play.submit()
    zombie = play.claim("fetch", policy=EXPIRED)
    heir = play.claim("fetch", worker_id=play.add_worker("host-b"))
    assert zombie
    assert heir
    assert (heir.step_id, heir.token) == (zombie.step_id, zombie.token + 1)
    before = play.job(job_id)
    assert not claims.is_held(play.database, zombie)
    with pytest.raises(LeaseLost):
        play.finish(zombie)
    with pytest.raises(LeaseLost):
        play.fail(zombie, SourceUnavailable("The hub is away."))
    with pytest.raises(LeaseLost):
        claims.extend_lease(play.database, zombie, 30)
    with pytest.raises(LeaseLost):
        claims.report_progress(play.database, zombie, "half", 0.5)
    with pytest.raises(LeaseLost):
        claims.pin_attempt(play.database, zombie)
    claims.release_step(play.database, zombie)
    assert play.job(job_id) == before
    assert attempts(play.database, heir.step_id) == ["lost", "running"]
    play.finish(heir)
    assert play.step_states(job_id)["resolve"] == ["succeeded"]


def test_control_without_the_fence_a_zombie_overwrites(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    play.submit()
    zombie = play.claim("fetch", policy=EXPIRED)
    heir = play.claim("fetch", worker_id=play.add_worker("host-b"))
    assert zombie
    assert heir
    fenced = moves.move_step

    def unfenced(*args: Any, token: int | None = None, **kwargs: Any) -> bool:
        return fenced(*args, **kwargs)

    monkeypatch.setattr(results, "move_step", unfenced)
    play.finish(zombie)
    with pytest.raises(LeaseLost):
        play.finish(heir)


def test_racing_workers_claim_each_step_once(play: Play) -> None:
    for number in range(12):
        play.submit(f"/models/{number}")
    workers = [play.add_worker(f"host-{number}", {"fetch": 12}) for number in range(4)]

    def claim_until_empty(worker_id: str) -> list[str]:
        found = []
        while (claim := play.claim("fetch", worker_id=worker_id)) is not None:
            found.append(claim.step_id)
        return found

    with ThreadPoolExecutor(4) as pool:
        claimed = [step_id for found in pool.map(claim_until_empty, workers) for step_id in found]
    assert len(claimed) == 12
    assert len(set(claimed)) == 12


def test_a_transient_error_is_tried_again_until_the_limit(play: Play) -> None:
    job_id = play.submit()
    outcomes = []
    for _ in range(3):
        claim = play.claim("fetch")
        assert claim
        outcomes.append(play.fail(claim, SourceUnavailable("The hub is away.")))
    assert outcomes == [True, True, False]
    job = play.job(job_id)
    assert job["state"] == "failed"
    assert job["variants"][0]["error"]["code"] == "source_unavailable"
    assert job["steps"][0]["attempts"] == 3


def test_a_pause_stands_between_tries(play: Play) -> None:
    play.submit()
    claim = play.claim("fetch")
    assert claim
    patient = claims.LeasePolicy(30, 60, max_failures=3, max_losses=10, retry_pause_s=60)
    assert results.fail_step(play.database, claim, StoreUnavailable("503"), results.Usage(), patient)
    assert play.claim("fetch") is None
    assert claims.due_classes(play.database) == []


def test_crashing_children_park_their_step_after_three(play: Play) -> None:
    job_id = play.submit()
    for _ in range(3):
        claim = play.claim("fetch")
        assert claim
        play.fail(claim, ChildCrashed("The child was killed by SIGSEGV.", log_tail="the end"))
    error = play.job(job_id)["steps"][0]["error"]
    assert error["code"] == "parked"
    assert error["details"]["log_tail"] == "the end"


def test_lost_workers_park_a_step_after_ten_and_a_release_counts_for_nothing(play: Play) -> None:
    job_id = play.submit()
    for _ in range(3):
        claim = play.claim("fetch")
        assert claim
        claims.release_step(play.database, claim)
    for _ in range(10):
        assert play.claim("fetch", policy=EXPIRED)
    assert play.claim("fetch", policy=EXPIRED) is None
    job = play.job(job_id)
    assert job["steps"][0]["error"]["code"] == "parked"
    assert job["state"] == "failed"


def test_a_started_benchmark_is_never_taken_over(play: Play) -> None:
    job_id = play.submit(recipes=["none"], formats=["tflite"], devices=["host"])
    claim = play.claim_kind("benchmark", EXPIRED)
    claims.pin_attempt(play.database, claim)
    claims.end_hopeless_steps(play.database, POLICY)
    play.run_all()
    job = play.job(job_id)
    (benchmark,) = [step for step in job["steps"] if step["kind"] == "benchmark"]
    assert benchmark["error"]["code"] == "lost"
    assert benchmark["attempts"] == 1
    # The artifact is published all the same; only the measurement is missing.
    assert [variant["state"] for variant in job["variants"]] == ["succeeded"]
    assert job["state"] == "partial"


def test_a_benchmark_that_was_not_started_is_taken_over(play: Play) -> None:
    job_id = play.submit(recipes=["none"], formats=["tflite"], devices=["host"])
    play.claim_kind("benchmark", EXPIRED)
    play.run_all()
    assert play.job(job_id)["state"] == "succeeded"


def test_a_failed_benchmark_is_not_repeated_and_leaves_the_job_partial(play: Play) -> None:
    job_id = play.submit(recipes=["none"], formats=["tflite"], devices=["host"])
    claim = play.claim_kind("benchmark")
    claims.pin_attempt(play.database, claim)
    assert not play.fail(claim, ChildCrashed("The tool died."))
    play.run_all()
    assert play.job(job_id)["state"] == "partial"


def test_a_benchmark_has_its_host_to_itself(play: Play) -> None:
    play.submit(recipes=["none"], formats=["tflite"], devices=["host"])
    while (claim := play.claim("fetch", "convert", "light")) is not None:
        play.finish(claim)
    play.submit("/models/other")
    busy = play.claim("fetch")
    assert busy
    assert play.claim("device") is None, "the host is busy"
    play.finish(busy)
    assert play.claim("device")
    assert play.claim("fetch") is None, "a benchmark runs here"
    assert play.claim("fetch", worker_id=play.add_worker("host-b")), "another host is free"


def test_a_benchmark_that_waits_long_holds_other_work_back(play: Play) -> None:
    play.submit(recipes=["none"], formats=["tflite"], devices=["host"])
    while (claim := play.claim("fetch", "convert", "light")) is not None:
        play.finish(claim)
    play.submit("/models/other")
    impatient = claims.LeasePolicy(30, benchmark_patience_s=-1, max_failures=3, max_losses=10, retry_pause_s=0)
    assert play.claim("fetch", policy=impatient) is None
    assert play.claim("device", policy=impatient)


def test_a_gate_on_speed_makes_the_publication_wait(play: Play) -> None:
    gates = {"min_decode_tokens_per_s": 1.0}
    job_id = play.submit(recipes=["none"], formats=["litertlm"], devices=["host"], gates=gates)
    while (claim := play.claim("fetch", "convert", "light")) is not None:
        play.finish(claim)
    assert play.step_states(job_id)["publish"] == ["waiting"]
    claim = play.claim("device")
    assert claim
    play.fail(claim, BenchmarkFailed("0 tokens/s"))
    job = play.job(job_id)
    assert job["state"] == "failed"
    assert job["variants"][0]["error"]["code"] == "benchmark_failed"


def test_a_condemned_blob_is_refused_and_the_step_stays_running(play: Play) -> None:
    from service.errors import BlobCondemned
    from service.ledger.tables import Blob

    job_id = play.submit()
    claim = play.claim_kind("fetch")
    (output,) = outputs_of(claim)
    play.finish(claim)
    play.run_all()

    def condemn(tx: Any) -> None:
        tx.connection.execute(update(Blob).where(Blob.digest == output.digest).values(condemned_at=now()))

    play.database.write(condemn)
    play.submit("/models/other")
    other = play.claim_kind("fetch")
    with pytest.raises(BlobCondemned):
        play.finish(other, [output])
    assert claims.is_held(play.database, other)
    assert play.job(job_id)["state"] == "succeeded"


def test_progress_is_seen_by_every_job_of_a_step(play: Play) -> None:
    first, second = play.submit(), play.submit()
    while (claim := play.claim("fetch", "light")) is not None:
        play.finish(claim)
    claim = play.claim("convert")
    assert claim
    claims.report_progress(play.database, claim, "lowering", 0.5)
    for job_id in (first, second):
        events = views.read_events(play.database, TENANT, job_id, after=0)["events"]
        assert {"message": "lowering", "fraction": 0.5}.items() <= events[-1]["data"].items()
        assert [event["number"] for event in events] == list(range(1, len(events) + 1))


def test_usage_of_a_cancelled_attempt_is_kept(play: Play) -> None:
    from service.ledger import jobs

    job_id = play.submit()
    claim = play.claim("fetch")
    assert claim
    jobs.cancel_job(play.database, TENANT, job_id)
    log = OutputFile("log.txt", "f" * 64, 3)
    results.record_usage(play.database, claim, results.Usage(duration_s=1.5, peak_anon_bytes=7, log=log))
    (step,) = play.job(job_id)["steps"]
    assert (step["state"], step["duration_s"], step["peak_anon_bytes"]) == ("cancelled", 1.5, 7)
    (entry,) = views.list_logs(play.database, TENANT, job_id)
    assert entry["log_digest"] == "f" * 64


def test_no_step_runs_without_a_lease(database: Database) -> None:
    """The CHECK constraint holds whatever the code does."""
    from sqlalchemy.exc import IntegrityError

    play = Play(database)
    play.submit()
    claim = play.claim("fetch")
    assert claim

    def drop_lease(tx: Any) -> None:
        tx.connection.execute(update(Step).where(Step.id == claim.step_id).values(lease_expires_at=None))

    with pytest.raises(IntegrityError):
        database.write(drop_lease)


def test_finishing_needs_no_clock_of_the_worker(play: Play) -> None:
    """Instants come from the database, in order."""
    job_id = play.submit()
    claim = play.claim("fetch")
    assert claim
    results.finish_step(play.database, claim, results.Success(figures_of(claim)), TOOLCHAIN, BENCHMARK)
    (step, *_) = play.job(job_id)["steps"]
    assert step["created_at"] <= step["started_at"] <= step["finalized_at"]
