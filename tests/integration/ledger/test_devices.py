"""Phones in the ledger: who claims for which, what a lease means, and what becomes of it."""

from __future__ import annotations

import pytest
from sqlalchemy import select, update

from service.errors import DeviceFull, DeviceLost, LeaseLost, NotFound
from service.ledger import claims, devices
from service.ledger.database import Database
from service.ledger.states import DeviceState
from service.ledger.tables import Attempt, Step
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


def test_backends_and_threads_are_measured_each(play: Play) -> None:
    attach(play, "A")
    submit(play, "any", backends=["cpu", "gpu"], threads=[2, 4])
    seen = set()
    while (held := claim(play, "A")) is not None:
        seen.add((held.params["backend"], held.params["threads"]))
        play.finish(held)
    assert seen == {("cpu", 2), ("cpu", 4), ("gpu", 2), ("gpu", 4)}


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
