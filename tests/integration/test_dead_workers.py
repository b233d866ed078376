"""Workers and children that die, as processes: what the ledger promises of them, read from its own times."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from service.errors import ChildCrashed, Parked
from service.ledger.clock import now
from service.ledger.tables import Attempt
from service.settings import load_settings
from tests.kiln import IMPATIENT, wait_for
from tests.light_fleet import LightFleet, light_fleet

LEASE_S = dt.timedelta(seconds=IMPATIENT["lease_s"])
SWEEP_S = dt.timedelta(seconds=IMPATIENT["sweep_s"])
#: From the sweep's wake-up to the claim that it leads to: a process of a busy machine has to run in between.
CLAIM_S = dt.timedelta(seconds=30)
_NEVER_S = 3600
#: How long the control is watched. Every sweep but the first is off; no time could change the outcome.
_WATCHED_S = 3.0


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LightFleet]:
    with light_fleet(tmp_path) as made:
        yield made


def test_a_step_whose_child_crashes_parks_after_three_and_its_worker_lives(fleet: LightFleet) -> None:
    worker = fleet.start_worker("one")
    job = fleet.client.wait(fleet.submit(fleet.write_model("crashing", fate="crashed")))
    assert job["state"] == "failed", job
    (crashed,) = [step for step in job["steps"] if step["kind"] == "quantize"]
    assert (crashed["state"], crashed["error"]["code"]) == ("failed", Parked.code)
    assert fleet.attempts(crashed["id"]) == [("one", "failed")] * load_settings({}).max_failures
    assert load_settings({}).max_failures == 3
    codes = fleet.database.read(
        lambda connection: list(
            connection.execute(
                select(Attempt.error).where(Attempt.step_id == crashed["id"]).order_by(Attempt.token)
            ).scalars()
        )
    )
    assert {error["code"] for error in codes} <= {ChildCrashed.code, Parked.code}
    assert codes[0]["code"] == ChildCrashed.code
    others = [step for step in job["steps"] if step["kind"] not in ("quantize", "bundle", "verify", "publish")]
    assert {step["state"] for step in others} == {"succeeded"}, "nothing else was harmed"

    following = fleet.client.wait(fleet.submit(fleet.write_model("next")))
    assert following["state"] == "succeeded"
    assert worker.poll() is None
    assert fleet.hosts_of(following["id"]) == {"one"}


def kill_in_the_midst(fleet: LightFleet, **survivor: object) -> tuple[str, dt.datetime]:
    """Kill a worker that holds a step, while another is there; return the step, and when the dead one's lease ends."""
    doomed = fleet.start_worker("one")
    job_id = fleet.submit(fleet.write_model("held", hold="convert"))
    step_id = fleet.wait_running(job_id, "convert")["id"]
    sign = fleet.folder / "two-sweeps"
    fleet.start_worker("two", worker_file=sign, **survivor)
    wait_for(sign.exists, "the other one has begun to sweep: nothing is due yet")
    doomed.kill()
    doomed.wait()
    dead_at = read_clock(fleet)
    lease_ends_at = fleet.read_step(step_id).lease_expires_at
    assert lease_ends_at <= dead_at + LEASE_S, "no longer than was set"
    assert fleet.attempts(step_id) == [("one", "running")]
    return step_id, lease_ends_at


def read_clock(fleet: LightFleet) -> dt.datetime:
    read: dt.datetime = fleet.database.read(lambda connection: connection.execute(select(now())).scalar_one())
    return read


def test_a_dead_worker_s_step_is_taken_up_within_lease_and_sweep(fleet: LightFleet) -> None:
    step_id, lease_ends_at = kill_in_the_midst(fleet)
    wait_for(lambda: len(fleet.attempts(step_id)) == 2, "the step is taken up")
    assert fleet.attempts(step_id) == [("one", "lost"), ("two", "running")]
    taken_at = fleet.database.read(
        lambda connection: (
            connection.execute(
                select(Attempt.started_at).where(Attempt.step_id == step_id).order_by(Attempt.token.desc())
            )
            .scalars()
            .first()
        )
    )
    assert taken_at is not None
    assert lease_ends_at <= taken_at <= lease_ends_at + SWEEP_S + CLAIM_S
    assert fleet.read_step(step_id).failure_count == 0, "it was not the step's fault"


def test_the_control_without_a_sweep_leaves_it_where_it_was(fleet: LightFleet) -> None:
    step_id, lease_ends_at = kill_in_the_midst(fleet, sweep_s=_NEVER_S)
    wait_for(lambda: read_clock(fleet) > lease_ends_at, "the lease has run out")
    threading.Event().wait(_WATCHED_S)
    assert fleet.attempts(step_id) == [("one", "running")]
