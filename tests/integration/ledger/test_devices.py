"""Phones in the ledger: who claims for which, what a lease means, and what becomes of it."""

from __future__ import annotations

import pytest
from sqlalchemy import select, update

from service.errors import DeviceFull, DeviceLost, LeaseLost, NotFound
from service.ledger import claims, devices, fleet
from service.ledger.clock import now
from service.ledger.database import Database
from service.ledger.states import DeviceState
from service.ledger.tables import Attempt, Step, Worker
from tests.ledger_play import EXPIRED, POLICY, Play

RECORD = {"kind": "phone", "model": "Pixel", "soc": "G4", "android": 15, "ram_gib": 12.0}


@pytest.fixture
def play(database: Database) -> Play:
    return Play(database)


def attach(play: Play, device_id: str, worker_id: str | None = None, **record: object) -> DeviceState | None:
    return devices.register_device(
        play.database, worker_id or play.worker_id, device_id, {**RECORD, "serial": device_id, **record}, [device_id]
    )


def submit(play: Play, *asked: str, **fields: object) -> str:
    """Submit a job whose benchmarks are due."""
    job_id = play.submit(recipes=["none"], formats=["litertlm"], devices=list(asked), **fields)
    play.run_all()
    return job_id


def claim(play: Play, device_id: str, policy: claims.LeasePolicy = POLICY) -> claims.Claim | None:
    return claims.claim_for_device(play.database, play.worker_id, device_id, policy)


def attempts(play: Play, held: claims.Claim) -> list[str]:
    statement = select(Attempt.state).where(Attempt.step_id == held.step_id).order_by(Attempt.token)
    return play.database.read(lambda connection: list(connection.execute(statement).scalars()))


def test_a_phone_takes_what_it_fits_and_nothing_else(play: Play) -> None:
    attach(play, "A")
    attach(play, "B", soc="other")
    submit(play, "soc=G4")
    assert claim(play, "B") is None
    held = claim(play, "A")
    assert held is not None
    assert held.params["device"] == "soc=G4"
    assert {device["id"]: device["state"] for device in devices.list_devices(play.database)} == {
        "A": "busy",
        "B": "ready",
    }


def test_workers_of_hosts_leave_phones_alone(play: Play) -> None:
    submit(play, "any")
    assert play.claim("device") is None


def test_a_phone_runs_one_step_at_a_time(play: Play) -> None:
    attach(play, "A")
    submit(play, "any")
    submit(play, "any")
    first = claim(play, "A")
    assert first is not None
    assert claim(play, "A") is None
    play.finish(first)
    assert claim(play, "A") is not None


def test_all_means_each_phone_that_is_ready(play: Play) -> None:
    for device_id in ("A", "B", "C"):
        attach(play, device_id)
    devices.tell_state(play.database, play.worker_id, "C", DeviceState.OFFLINE, "it hangs", ["C"])
    submit(play, "all")
    taken = {device_id: claim(play, device_id) for device_id in ("A", "B", "C")}
    assert {device_id for device_id, held in taken.items() if held is not None} == {"A", "B"}
    assert claim(play, "A") is None


def test_backends_and_threads_are_arms_of_one_run(play: Play) -> None:
    attach(play, "A")
    submit(play, "any", backends=["cpu", "gpu"], threads=[2, 4])
    held = claim(play, "A")
    assert held is not None
    ways = [(arm["backend"], arm["threads"]) for arm in held.params["arms"]]
    assert ways == [("cpu", 2), ("cpu", 4), ("gpu", None)]
    assert claim(play, "A") is None


MEASURED = {"device": {"kind": "phone", "serial": "A"}, "format": "litertlm", "verdict": "stable"}
FAILED = {"code": "benchmark_failed", "message": "It crashed.", "retryable": False, "details": {}}


@pytest.mark.parametrize("is_whole", [True, False])
def test_an_arm_that_failed_leaves_the_others_figures_and_a_job_that_is_partial(play: Play, is_whole: bool) -> None:
    attach(play, "A")
    job_id = submit(play, "any", backends=["cpu", "gpu"])
    held = claim(play, "A")
    assert held is not None
    gpu = MEASURED if is_whole else {"format": "litertlm", "error": FAILED}
    arms = [
        {**MEASURED, "backend": "cpu", "threads": None, "document": "measurement-1.json"},
        {**gpu, "backend": "gpu", "threads": None, "document": "measurement-2.json"},
    ]
    play.finish(held, arms=arms)
    job = play.job(job_id)
    (variant,) = job["variants"]
    assert variant["state"] == "succeeded"
    assert job["state"] == ("succeeded" if is_whole else "partial")
    assert [each["backend"] for each in variant["measurements"]] == ["cpu", "gpu"][: 1 + is_whole]
    (benchmark,) = [step for step in job["steps"] if step["kind"] == "benchmark"]
    assert (benchmark["error"] is None) == is_whole
    if not is_whole:
        assert benchmark["error"]["message"] == "litertlm on gpu: It crashed."


def test_two_workers_that_see_one_phone_do_not_share_it(play: Play) -> None:
    """It hangs on the cable of one host, and is seen over the network by the other."""
    other = play.add_worker("host-b")
    assert attach(play, "A")
    assert not attach(play, "A", other)
    submit(play, "any")
    assert claims.claim_for_device(play.database, other, "A", POLICY) is None
    devices.leave_devices(play.database, play.worker_id)
    assert attach(play, "A", other)
    assert claims.claim_for_device(play.database, other, "A", POLICY) is not None


def test_what_was_not_begun_passes_on_when_its_worker_vanishes(play: Play) -> None:
    attach(play, "A")
    attach(play, "B")
    submit(play, "any")
    lost = claim(play, "A", EXPIRED)
    assert lost is not None
    again = claim(play, "B")
    assert again is not None
    assert (again.step_id, again.token) == (lost.step_id, lost.token + 1)
    # The phone of the vanished worker is free, its token is not worth anything any more.
    submit(play, "any")
    assert claim(play, "A") is not None
    with pytest.raises(LeaseLost):
        claims.pin_attempt(play.database, lost)


def test_a_measurement_that_has_begun_is_never_repeated_by_itself(play: Play) -> None:
    attach(play, "A")
    job_id = submit(play, "any")
    lost = claim(play, "A", EXPIRED)
    assert lost is not None
    claims.pin_attempt(play.database, lost)
    assert claim(play, "A") is None
    assert attempts(play, lost) == ["lost"]
    assert play.step_states(job_id)["benchmark"] == ["failed"]


def test_control_without_the_mark_it_would_be_repeated(play: Play) -> None:
    attach(play, "A")
    submit(play, "any")
    lost = claim(play, "A", EXPIRED)
    assert lost is not None
    claims.pin_attempt(play.database, lost)
    play.database.write(lambda tx: tx.connection.execute(update(Step).values(pinned_at=None)))
    assert claim(play, "A") is not None


def test_a_phone_lost_while_it_measured_ends_the_attempt_as_lost(play: Play) -> None:
    attach(play, "A")
    submit(play, "any")
    held = claim(play, "A")
    assert held is not None
    claims.pin_attempt(play.database, held)
    assert not play.fail(held, DeviceLost("gone"))
    assert attempts(play, held) == ["lost"]


def test_a_phone_that_fails_before_lets_another_try(play: Play) -> None:
    attach(play, "A")
    attach(play, "B")
    submit(play, "any")
    held = claim(play, "A")
    assert held is not None
    assert play.fail(held, DeviceFull("full"))
    devices.tell_state(play.database, play.worker_id, "A", DeviceState.QUARANTINED, "full", ["A"])
    assert claim(play, "A") is None
    assert claim(play, "B") is not None
    assert attempts(play, held) == ["failed", "running"]


def test_a_quarantined_phone_waits_for_an_operator(play: Play) -> None:
    attach(play, "A")
    devices.tell_state(play.database, play.worker_id, "A", DeviceState.QUARANTINED, "it hangs", ["A"])
    devices.tag_device(play.database, "A", ["slow"])
    (seen,) = devices.list_devices(play.database)
    assert (seen["state"], seen["reason"], seen["tags"]) == ("quarantined", "it hangs", ["slow"])
    devices.release_device(play.database, "A")
    assert devices.list_devices(play.database)[0]["state"] == "absent"
    assert attach(play, "A")
    with pytest.raises(NotFound):
        devices.release_device(play.database, "Z")


def test_a_phone_that_was_given_up_stays_so_for_a_worker_that_starts_anew(play: Play) -> None:
    attach(play, "A")
    devices.tell_state(play.database, play.worker_id, "A", DeviceState.QUARANTINED, "It hangs.", ["A"])
    attach(play, "A")
    assert [(each["state"], each["reason"]) for each in devices.list_devices(play.database)] == [
        ("quarantined", "It hangs.")
    ]
    devices.tell_state(play.database, play.worker_id, "A", DeviceState.ABSENT, "adb does not know it.", [])
    attach(play, "A")
    assert [each["state"] for each in devices.list_devices(play.database)] == ["ready"]


def test_what_waits_for_an_absent_phone_holds_up_no_other(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_OFFERED", 1)
    attach(play, "A")
    for number in range(3):
        submit(play, "serial=ABSENT", source={"kind": "folder", "path": f"/models/{number}"})
    submit(play, "serial=A", source={"kind": "folder", "path": "/models/a"})
    held = claim(play, "A")
    assert held is not None
    assert held.params["device"] == "serial=A"


def show(play: Play, **options: bool) -> dict[str, dict[str, object]]:
    return {each["id"]: each for each in devices.list_devices(play.database, **options)}


def test_a_host_is_a_device_as_long_as_a_worker_measures_there(play: Play) -> None:
    devices.enter_host(play.database, play.worker_id, "host-1", {"kind": "host", "soc": "Xeon"})
    attach(play, "A")
    assert {each["id"]: each["state"] for each in devices.list_devices(play.database)} == {
        "A": "ready",
        "host-1": "ready",
    }
    # `all` means phones.
    submit(play, "all", "host")
    seen = set()
    while (held := claim(play, "A")) is not None:
        seen.add(held.params["device"])
        play.finish(held)
    assert seen == {"serial=A"}
    # A second worker of the same host keeps it there when the first one ends.
    other = play.add_worker("host-a")
    fleet.end_worker(play.database, play.worker_id)
    assert show(play)["host-1"]["state"] == "ready"
    fleet.end_worker(play.database, other)
    assert (show(play)["host-1"]["state"], show(play)["host-1"]["reason"]) == (
        "absent",
        "None of its workers measures.",
    )


def test_a_host_that_measures_is_busy(play: Play) -> None:
    devices.enter_host(play.database, play.worker_id, "host-1", {"kind": "host"})
    play.submit(recipes=["none"], formats=["litertlm"], devices=["host"])
    held = play.claim_kind("benchmark")
    assert show(play)["host-1"]["state"] == "busy"
    play.finish(held)
    assert show(play)["host-1"]["state"] == "ready"


def test_what_a_silent_worker_has_said_does_not_count(play: Play) -> None:
    attach(play, "A")
    play.database.write(lambda tx: tx.connection.execute(update(Worker).values(heartbeat_at=now(-3600))))
    assert (show(play)["A"]["state"], show(play)["A"]["reason"]) == ("absent", "Its device worker is silent.")
    other = play.add_worker("host-b")
    assert attach(play, "A", other) is DeviceState.READY


def test_a_phone_that_has_never_answered_is_shown_until_it_has_gone_or_tells_its_name(play: Play) -> None:
    assert devices.enter_silent_device(play.database, play.worker_id, "10.0.0.7:5555") is not None
    devices.tell_state(
        play.database, play.worker_id, "10.0.0.7:5555", DeviceState.UNAUTHORIZED, "No.", ["10.0.0.7:5555"]
    )
    found = show(play)["10.0.0.7:5555"]
    assert (found["kind"], found["state"], found["soc"]) == ("unknown", "unauthorized", None)
    other = play.add_worker("host-b")
    assert devices.enter_silent_device(play.database, other, "10.0.0.7:5555") is None, "one of them follows it"
    devices.forget_silent_device(play.database, other, "10.0.0.7:5555")
    assert "10.0.0.7:5555" in show(play)
    devices.leave_devices(play.database, play.worker_id)
    assert show(play) == {}


def test_a_known_phone_that_does_not_answer_stays_what_it_is(play: Play) -> None:
    """Over a cable, adb's serial number is the phone's own."""
    attach(play, "A")
    devices.leave_devices(play.database, play.worker_id)
    record = devices.enter_silent_device(play.database, play.worker_id, "A")
    assert record is not None
    assert record["soc"] == "G4"
    devices.forget_silent_device(play.database, play.worker_id, "A")
    assert show(play)["A"]["state"] == "offline"


def test_a_connection_of_a_phone_that_is_followed_is_no_other_phone(play: Play) -> None:
    devices.register_device(play.database, play.worker_id, "A", {**RECORD, "serial": "A"}, ["10.0.0.7:5555"])
    other = play.add_worker("host-b")
    assert devices.enter_silent_device(play.database, other, "10.0.0.7:5555") is None


def test_tenants_are_not_told_where_a_phone_hangs_and_why_it_fails(play: Play) -> None:
    attach(play, "A")
    devices.tell_state(play.database, play.worker_id, "A", DeviceState.QUARANTINED, "It was hot thrice.", ["10.0.0.7"])
    assert (show(play)["A"]["reason"], show(play)["A"]["connections"], show(play)["A"]["host"]) == (
        "It was hot thrice.",
        ["10.0.0.7"],
        "host-a",
    )
    told = show(play, for_operator=False)["A"]
    assert (told["state"], told["connections"], told["host"]) == ("quarantined", [], None)
    assert told["reason"] == "It was given up, until an operator looks at it."
