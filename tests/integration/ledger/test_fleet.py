"""The fleet: what operators see of it, and what draining keeps a worker from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import update

from service.errors import NotFound
from service.ledger import claims, fleet, roster
from service.ledger.clock import now
from service.ledger.database import Database
from service.ledger.tables import Worker
from tests.ledger_play import Play


@pytest.fixture
def play(database: Database) -> Play:
    return Play(database)


def see(play: Play, worker_id: str) -> dict[str, Any]:
    return roster.read_worker(play.database, worker_id)


def silence(play: Play, worker_id: str, age_s: float) -> None:
    aged = update(Worker).where(Worker.id == worker_id).values(heartbeat_at=now(-age_s))
    play.database.write(lambda tx: tx.connection.execute(aged))


def test_a_worker_is_seen_with_what_it_has_and_runs(play: Play) -> None:
    play.submit(formats=["tflite"], recipes=["none"])
    predicted = {"convert:reauthored": 70, "reference": 20}
    play.finish(play.claim_kind("plan"), predicted_peak_anon_bytes=predicted)
    other = play.add_worker("host-b", {"convert": 1})
    convert, reference = play.claim("convert"), play.claim("light")
    assert convert
    assert reference
    seen = see(play, play.worker_id)
    assert (seen["host"], seen["state"], seen["cores"], seen["memory_bytes"]) == ("host-a", "live", 2, 120)
    assert (seen["memory_predicted_bytes"], seen["memory_limit_bytes"]) == (90, 100)
    assert seen["slots"]["convert"] == {"busy": 1, "total": 2}
    assert seen["slots"]["fetch"] == {"busy": 0, "total": 2}
    assert seen["toolchain"] == {"converter": "1"}
    assert 0 <= seen["heartbeat_age_s"] < 60
    assert [(step["step_id"], step["kind"], step["tenant"]) for step in seen["running"]] == [
        (convert.step_id, "convert", "default"),
        (reference.step_id, "reference", "default"),
    ]
    idle = see(play, other)
    assert (idle["running"], idle["memory_predicted_bytes"]) == ([], 0)
    assert [worker["id"] for worker in roster.read_roster(play.database)] == [play.worker_id, other]


def test_disk_is_what_the_last_heartbeat_said(play: Play) -> None:
    assert see(play, play.worker_id)["disk_free_bytes"] is None
    fleet.beat_worker(play.database, play.worker_id, 7)
    assert see(play, play.worker_id)["disk_free_bytes"] == 7


def test_a_silent_worker_is_called_silent_and_forgotten_after_a_day(play: Play) -> None:
    silence(play, play.worker_id, 61)
    assert see(play, play.worker_id)["state"] == "silent"
    fleet.drain_worker(play.database, play.worker_id)
    assert see(play, play.worker_id)["state"] == "silent"
    silence(play, play.worker_id, 25 * 3600)
    assert roster.read_roster(play.database) == []


def test_a_worker_that_ends_is_neither_seen_nor_counted_on(play: Play) -> None:
    play.submit()
    assert claims.due_classes(play.database) == ["fetch"]
    fleet.end_worker(play.database, play.worker_id)
    assert roster.read_roster(play.database) == []
    assert fleet.list_workers(play.database, 60) == []
    assert fleet.find_largest_memory(play.database, "convert") is None
    assert claims.due_classes(play.database) == []


def test_a_drained_worker_claims_nothing_and_finishes_what_it_runs(play: Play) -> None:
    job_id = play.submit()
    held = play.claim("fetch")
    assert held
    play.submit("/models/other")
    fleet.drain_worker(play.database, play.worker_id)
    assert see(play, play.worker_id)["state"] == "draining"
    assert play.claim() is None
    # It is still counted on, and still keeps its lease.
    claims.extend_lease(play.database, held, 30)
    play.finish(held)
    assert play.step_states(job_id)["resolve"] == ["succeeded"]
    assert play.claim() is None
    assert see(play, play.worker_id)["running"] == []


def test_control_a_worker_that_is_not_drained_claims_on(play: Play) -> None:
    play.submit()
    play.submit("/models/other")
    assert play.claim("fetch")
    assert play.claim("fetch")


def test_nobody_is_woken_for_drained_workers_alone_and_a_resumed_one_is(play: Play) -> None:
    woken: list[list[str]] = []
    play.submit()
    fleet.drain_worker(play.database, play.worker_id)
    assert claims.due_classes(play.database) == []
    play.database.poke = lambda classes: woken.append(sorted(classes))
    fleet.resume_worker(play.database, play.worker_id)
    assert woken == [["convert", "device", "fetch", "light"]]
    assert see(play, play.worker_id)["state"] == "live"
    assert play.claim("fetch")


def test_draining_twice_is_draining_once(play: Play) -> None:
    fleet.drain_worker(play.database, play.worker_id)
    since = see(play, play.worker_id)["draining_at"]
    fleet.drain_worker(play.database, play.worker_id)
    assert see(play, play.worker_id)["draining_at"] == since


def test_when_a_drain_has_returned_no_claim_is_under_way(play: Play) -> None:
    """Claims race with the drain; none is later than it."""
    for number in range(24):
        play.submit(f"/models/{number}")
    workers = [play.add_worker(f"host-{number}", {"fetch": 24}) for number in range(4)]

    def claim_until_drained(worker_id: str) -> int:
        held = 0
        while play.claim("fetch", worker_id=worker_id) is not None:
            held += 1
        return held

    def drain(worker_id: str) -> int:
        fleet.drain_worker(play.database, worker_id)
        return len(see(play, worker_id)["running"])

    with ThreadPoolExecutor(8) as pool:
        claiming = [pool.submit(claim_until_drained, worker_id) for worker_id in workers]
        at_drain = [pool.submit(drain, worker_id) for worker_id in workers]
        held = [future.result() for future in claiming]
        seen = [future.result() for future in at_drain]
    assert held == seen


def test_a_rolling_upgrade_by_draining_loses_nothing(play: Play) -> None:
    """Each worker is drained, finishes, is stopped and replaced: every step has one attempt."""
    job_id = play.submit(formats=["tflite", "litertlm"])
    workers = [play.worker_id, play.add_worker("host-b")]
    for old in workers:
        held = play.claim(worker_id=old)
        assert held
        fleet.drain_worker(play.database, old)
        new = play.add_worker("host-new")
        play.finish(held)
        assert see(play, old)["running"] == []
        fleet.end_worker(play.database, old)
        claim = play.claim(worker_id=new)
        assert claim
        play.finish(claim)
    play.worker_id = new
    play.run_all()
    job = play.job(job_id)
    assert job["state"] == "succeeded"
    assert {step["attempts"] for step in job["steps"]} == {1}


def test_a_worker_that_is_not_there_is_not_found(play: Play) -> None:
    for act in (fleet.drain_worker, fleet.resume_worker, roster.read_worker):
        with pytest.raises(NotFound, match="worker_0"):
            act(play.database, "worker_0")
