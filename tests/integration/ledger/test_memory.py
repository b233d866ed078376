"""Predicted memory: who may claim a step, what runs side by side, and what is refused at once."""

from __future__ import annotations

from typing import Any

import pytest

from service.errors import MemoryInsufficient
from service.ledger import claims, fleet
from service.ledger.claims import Claim
from service.ledger.database import Database
from tests.ledger_play import Play

#: A worker of `Play` may use 100 bytes for a step, and its host has 120.
PREDICTED = {"convert:reauthored": 80, "reference": 40, "quantize:none": 10, "quantize": 20, "verify:none:tflite": 30}


@pytest.fixture
def play(database: Database) -> Play:
    return Play(database)


def plan(play: Play, predicted: dict[str, int], **fields: Any) -> str:
    """Submit a job and finish its plan with these predictions."""
    job_id = play.submit(formats=["tflite"], **fields)
    play.finish(play.claim_kind("plan"), predicted_peak_anon_bytes=predicted)
    return job_id


def predictions(play: Play, job_id: str) -> dict[str, list[int | None]]:
    found: dict[str, list[int | None]] = {}
    for step in play.job(job_id)["steps"]:
        found.setdefault(step["kind"], []).append(step["predicted_peak_anon_bytes"])
    return found


def silence(play: Play, worker_id: str) -> None:
    play.database.write(
        lambda tx: tx.connection.exec_driver_sql(
            f"UPDATE workers SET heartbeat_at = '2001-01-01 00:00:00.000+00' WHERE id = '{worker_id}'"
        )
    )


def test_each_step_keeps_the_closest_prediction(play: Play) -> None:
    job_id = plan(play, PREDICTED, recipes=["none", "dynamic_int8"])
    assert predictions(play, job_id) == {
        "resolve": [None],
        "fetch": [None],
        "plan": [None],
        "reference": [40],
        "convert": [80],
        "quantize": [10, 20],
        "verify": [30, None],
        "publish": [None, None],
    }


def test_what_no_worker_can_hold_is_refused_with_the_number(play: Play) -> None:
    play.add_worker("host-b", memory_limit_bytes=110)
    job_id = play.submit(formats=["tflite"])
    claim = play.claim_kind("plan")
    with pytest.raises(MemoryInsufficient) as refusal:
        play.finish(claim, predicted_peak_anon_bytes={**PREDICTED, "convert:reauthored": 111})
    assert refusal.value.details == {
        "step": "convert:reauthored",
        "predicted_peak_anon_bytes": 111,
        "largest_memory_bytes": 110,
    }
    # Nothing of the plan was kept: there is no step that could be run.
    assert set(play.step_states(job_id)) == {"resolve", "fetch", "plan"}
    assert not play.fail(claim, refusal.value)
    job = play.job(job_id)
    assert job["state"] == "failed"
    assert {variant["error"]["code"] for variant in job["variants"]} == {"memory_insufficient"}


def test_a_larger_worker_lets_the_same_plan_pass(play: Play) -> None:
    """Control, and what a retry does once there is one."""
    play.add_worker("host-b", memory_limit_bytes=111)
    job_id = plan(play, {**PREDICTED, "convert:reauthored": 111})
    assert "convert" in play.step_states(job_id)


def test_a_larger_worker_of_another_class_does_not_help(play: Play) -> None:
    play.add_worker("host-b", {"light": 1}, memory_limit_bytes=1000)
    with pytest.raises(MemoryInsufficient):
        plan(play, {"convert:reauthored": 111})


def test_a_silent_worker_is_not_counted_on(play: Play) -> None:
    silence(play, play.add_worker("host-b", memory_limit_bytes=1000))
    with pytest.raises(MemoryInsufficient):
        plan(play, {"convert:reauthored": 111})


def test_finished_work_needs_no_memory(play: Play) -> None:
    """A job that only joins what was made elsewhere is not refused when the large worker is gone."""
    large = play.add_worker("host-b", memory_limit_bytes=1000)
    plan(play, {"convert:reauthored": 500})
    convert = play.claim("convert", worker_id=large)
    assert convert
    play.finish(convert)
    silence(play, large)
    job_id = plan(play, {"convert:reauthored": 500})
    assert play.step_states(job_id)["convert"] == ["succeeded"]


def test_a_step_goes_only_to_a_worker_that_can_hold_it(play: Play) -> None:
    small, large = play.worker_id, play.add_worker("host-b", memory_limit_bytes=1000)
    plan(play, {"convert:reauthored": 500})
    assert play.claim("convert", worker_id=small) is None
    assert kind(play.claim("convert", worker_id=large)) == "convert"


def test_a_step_whose_large_worker_is_gone_is_claimed_to_be_failed(play: Play) -> None:
    large = play.add_worker("host-b", memory_limit_bytes=1000)
    plan(play, {"convert:reauthored": 500})
    silence(play, large)
    claim = play.claim("convert")
    assert claim
    assert claim.predicted_peak_anon_bytes == 500


def test_a_large_worker_that_is_started_anew_finds_its_work_waiting(play: Play) -> None:
    large = play.add_worker("host-b", memory_limit_bytes=1000)
    plan(play, {"convert:reauthored": 500})
    given_back = play.claim("convert", worker_id=large)
    assert given_back
    claims.release_step(play.database, given_back)
    fleet.end_worker(play.database, large)
    assert play.claim("convert") is None
    assert kind(play.claim("convert", worker_id=play.add_worker("host-b", memory_limit_bytes=1000))) == "convert"


def test_a_worker_of_another_class_does_not_keep_a_step_waiting(play: Play) -> None:
    large = play.add_worker("host-b", memory_limit_bytes=1000)
    play.add_worker("host-c", {"light": 1}, memory_limit_bytes=1000)
    plan(play, {"convert:reauthored": 500})
    assert play.claim("convert") is None
    silence(play, large)
    assert kind(play.claim("convert")) == "convert"


def test_steps_that_do_not_fit_together_run_one_after_the_other(play: Play) -> None:
    plan(play, PREDICTED)
    convert = play.claim("convert")
    assert convert
    # 80 of 108 usable bytes are taken, on this host.
    assert play.claim("light") is None
    other = play.claim("light", worker_id=play.add_worker("host-b"))
    assert kind(other) == "reference"
    play.finish(convert)
    assert kind(play.claim("light")) == "quantize"


def test_steps_that_fit_together_run_side_by_side(play: Play) -> None:
    """Control."""
    plan(play, {**PREDICTED, "reference": 20})
    assert play.claim("convert")
    assert kind(play.claim("light")) == "reference"


def test_steps_without_a_prediction_run_beside_any_other(play: Play) -> None:
    plan(play, {"convert:reauthored": 100})
    assert play.claim("convert")
    assert kind(play.claim("light")) == "reference"


def kind(claim: Claim | None) -> str | None:
    return claim and claim.kind
