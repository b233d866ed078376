"""Where retries, refusals, benchmarks and strangers' text meet: each case once went wrong."""

from __future__ import annotations

from typing import Any

import pytest

from service.errors import BenchmarkFailed, CheckpointInvalid, GateRefused, StoreUnavailable
from service.ledger import claims, fleet, jobs, publications, results, views
from service.ledger.database import Database
from service.ledger.keys import Toolchain
from tests import ledger_play
from tests.ledger_play import SLOTS, TENANT, Play

IMPATIENT = claims.LeasePolicy(30, benchmark_patience_s=-1, max_failures=3, max_losses=10, retry_pause_s=0)
MEASURED: dict[str, Any] = {"recipes": ["none"], "formats": ["tflite"], "devices": ["host"]}


@pytest.fixture
def play(database: Database) -> Play:
    return Play(database)


def run_all_but_benchmarks(play: Play, worker_id: str | None = None) -> None:
    while (claim := play.claim("fetch", "convert", "light", worker_id=worker_id)) is not None:
        play.finish(claim)


def test_a_benchmark_that_nobody_here_can_run_holds_nothing_back(database: Database) -> None:
    play = Play(database)
    worker_id = play.add_worker("host-b", {**SLOTS, "device": 0})
    play.submit(**MEASURED)
    run_all_but_benchmarks(play, worker_id)
    play.submit("/models/other")
    assert play.claim("fetch", policy=IMPATIENT, worker_id=worker_id)


def test_a_retry_measures_again_what_failed_to_be_measured(play: Play) -> None:
    job_id = play.submit(**MEASURED)
    play.fail(play.claim_kind("benchmark"), BenchmarkFailed("0 tokens/s"))
    play.run_all()
    assert play.job(job_id)["state"] == "partial"
    jobs.retry_job(play.database, TENANT, job_id)
    assert play.run_all() == ["plan", "benchmark"]
    assert play.job(job_id)["state"] == "succeeded"


def test_a_retry_does_not_measure_twice(play: Play) -> None:
    job_id = play.submit(**MEASURED)
    run_all_but_publish(play)
    play.finish(play.claim_kind_only("benchmark"))
    play.fail(play.claim_kind_only("publish"), CheckpointInvalid("injected"))
    jobs.retry_job(play.database, TENANT, job_id)
    assert sorted(play.run_all()) == ["plan", "publish"]
    job = play.job(job_id)
    assert job["state"] == "succeeded"
    assert len(job["variants"][0]["measurements"]) == 1


def run_all_but_publish(play: Play) -> None:
    while (claim := play.claim("fetch", "convert", "light")) is not None:
        if claim.kind == "publish":
            claims.release_step(play.database, claim)
            return
        play.finish(claim)


def test_a_missed_gate_is_a_refusal_whatever_a_benchmark_did(play: Play) -> None:
    job_id = play.submit(**MEASURED)
    run_all_but_publish(play)
    play.fail(play.claim_kind_only("benchmark"), BenchmarkFailed("0 tokens/s"))
    play.fail(play.claim_kind_only("publish"), GateRefused("The KL is 2; the gate asks for at most 1."))
    (variant,) = play.job(job_id)["variants"]
    assert (variant["state"], variant["error"]["code"]) == ("refused", "gate_refused")


def test_strangers_text_is_recorded_readably(play: Play) -> None:
    job_id = play.submit()
    claim = play.claim("fetch")
    assert claim
    play.fail(
        claim, CheckpointInvalid("The tensor 'a\x00b' is odd.", tensor="a\x00b\ud800", **{"k\x00": [1, "\udfff"]})
    )
    error = play.job(job_id)["variants"][0]["error"]
    assert error["message"] == "The tensor 'a\ufffdb' is odd."
    assert error["details"] == {"tensor": "a\ufffdb\ufffd", "k\ufffd": [1, "\ufffd"]}


def draft(kind: str, digest: str) -> publications.Draft:
    return publications.Draft(kind, f"tiny.{kind}", digest, 10, digest, f'{{"of":"{digest}"}}')


def test_a_retry_publishes_its_own_draft(play: Play) -> None:
    job_id = play.submit(recipes=["none"], formats=["tflite"])
    digest = "a" * 64

    def publish(content: str) -> None:
        claim = play.claim_kind("publish")
        (output,) = claim.inputs["artifact_tflite"].outputs
        (kept,) = publications.record_publications(play.database, claim, [draft("tflite", output.digest)])
        assert kept.manifest_digest == output.digest
        if content == "fail":
            for _ in range(3):
                if not play.fail(claim, StoreUnavailable("503")):
                    break
                claim = play.claim_kind_only("publish")
            return
        play.finish(claim)

    publish("fail")
    assert play.job(job_id)["state"] == "failed"
    jobs.retry_job(play.database, TENANT, job_id)
    claim = play.claim_kind("publish")
    (output,) = claim.inputs["artifact_tflite"].outputs
    fresh = publications.Draft("tflite", "tiny.tflite", output.digest, 10, digest, '{"fresh":1}')
    assert publications.record_publications(play.database, claim, [fresh]) == [fresh]
    # The same step's later attempt keeps what the first recorded.
    later = publications.Draft("tflite", "tiny.tflite", output.digest, 10, "b" * 64, '{"later":1}')
    assert publications.record_publications(play.database, claim, [later]) == [fresh]
    play.finish(claim)
    (artifact,) = views.list_artifacts(play.database, TENANT, job_id)
    assert artifact["manifest_sha256"] == digest


def test_what_was_made_from_lost_bytes_is_proven_anew(play: Play) -> None:
    play.submit(recipes=["none"], formats=["tflite"])
    quantize = play.claim_kind("quantize")
    play.finish(quantize)
    play.run_all()
    results.retire_step(play.database, quantize.step_id)
    play.submit(recipes=["none"], formats=["tflite"])
    assert sorted(play.run_all()) == ["plan", "publish", "quantize", "resolve", "verify"]


def test_provenance_names_no_other_jobs_source(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    figures_of = ledger_play.figures_of

    def same_checkpoint(claim: claims.Claim) -> dict[str, Any]:
        figures = figures_of(claim)
        return {**figures, "checkpoint_digest": "d" * 64} if claim.kind == "fetch" else figures

    monkeypatch.setattr(ledger_play, "figures_of", same_checkpoint)
    play.submit("/secret/place", recipes=["none"])
    play.run_all()
    play.submit("/models/mine", recipes=["none"])
    provenance = publications.read_provenance(play.database, play.claim_kind("publish"))
    places = [step.params["source"]["path"] for step in provenance.ancestors if step.kind == "fetch"]
    assert places == ["/models/mine"]
    assert [step.kind for step in provenance.ancestors].count("convert") == 1


def test_a_started_benchmark_is_not_given_back(play: Play) -> None:
    job_id = play.submit(**MEASURED)
    claim = play.claim_kind("benchmark")
    claims.pin_attempt(play.database, claim)
    claims.release_step(play.database, claim)
    (benchmark,) = [step for step in play.job(job_id)["steps"] if step["kind"] == "benchmark"]
    assert (benchmark["state"], benchmark["error"]["code"]) == ("failed", "lost")


def test_one_wake_up_leads_to_the_next(play: Play) -> None:
    woken: list[str] = []
    play.database.poke = lambda classes: woken.extend(classes)
    for number in range(3):
        play.submit(f"/models/{number}")
    woken.clear()
    assert play.claim("fetch")
    assert woken == ["fetch"]
    assert play.claim("fetch")
    woken.clear()
    assert play.claim("fetch") is None
    assert woken == []


def test_nobody_is_woken_for_a_class_without_workers(play: Play) -> None:
    lonely = Play(play.database, host="host-c")
    job_id = lonely.submit(**MEASURED)
    run_all_but_benchmarks(lonely)
    assert claims.due_classes(play.database) == ["device"]

    def silence(tx: Any) -> None:
        tx.connection.exec_driver_sql("UPDATE workers SET heartbeat_at = '2001-01-01 00:00:00.000+00'")

    play.database.write(silence)
    assert claims.due_classes(play.database) == []
    assert not play.job(job_id)["is_final"]


def test_a_step_goes_to_the_tools_it_was_planned_for(play: Play) -> None:
    play.submit()
    while (claim := play.claim("fetch", "light")) is not None:
        play.finish(claim)
    newer = Toolchain({"converter": "2"}, {"convert": "b"})
    facts: dict[str, Any] = {"cores": 2, "memory_bytes": 1, "memory_limit_bytes": 1, "slots": SLOTS, "isolation": {}}
    other = fleet.register_worker(play.database, "host-b", toolchain=newer, **facts)
    assert play.claim("convert", worker_id=other) is None
    assert play.claim("convert")


def test_an_ended_job_hears_nothing_more(play: Play) -> None:
    ended, going = play.submit(), play.submit()
    while (claim := play.claim("fetch", "light")) is not None:
        play.finish(claim)
    convert = play.claim("convert")
    assert convert
    jobs.cancel_job(play.database, TENANT, ended)
    before = play.job(ended)["event_count"]
    play.finish(convert)
    play.run_all()
    assert play.job(ended)["event_count"] == before
    assert play.job(going)["state"] == "succeeded"
