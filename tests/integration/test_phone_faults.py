"""What becomes of a benchmark, its phone and everybody else's when something goes wrong: each fault, its typed end.

Real from the claim on: ledger, store, device worker, sandbox, adb server; the tool is a script
(`tests.virtual_phone.lab`). While a fault lasts, another phone is in the middle of a run, which must end well.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.ledger import devices
from tests.kiln import find_children, is_alive, wait_for
from tests.virtual_phone.bench import AttachedPhone
from tests.virtual_phone.lab import Lab, laboratory
from workers.device_worker import DeviceWorker

#: The command that runs a tool.
_RUN = r"exec "


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with laboratory(tmp_path_factory.mktemp("lab")) as made:
        yield made


@pytest.fixture(scope="module")
def worker(lab: Lab) -> Iterator[DeviceWorker]:
    with lab.worker() as running:
        yield running


@pytest.fixture(scope="module")
def other(lab: Lab) -> Iterator[AttachedPhone]:
    """A phone that nothing happens to."""
    with lab.phone("other") as attached:
        yield attached


@pytest.fixture
def phone(lab: Lab, worker: DeviceWorker, request: pytest.FixtureRequest) -> Iterator[AttachedPhone]:
    name = "".join(letter for letter in request.node.name if letter.isalnum())
    with lab.phone(name) as attached:
        lab.wait_for_state(attached.hardware_serial, "ready")
        yield attached


@pytest.fixture
def neighbour(lab: Lab, worker: DeviceWorker, other: AttachedPhone) -> Iterator[None]:
    """Another phone's run that begins before the fault and ends after it."""
    lab.wait_for_state(other.hardware_serial, "ready")
    step_id = lab.begin(other)
    yield
    other.let_go()
    assert lab.ended(step_id)["state"] == "succeeded", lab.attempts(step_id)
    assert lab.attempts(step_id) == [("succeeded", None)]


def check_usable(lab: Lab, phone: AttachedPhone) -> None:
    """Make sure that a phone is clean, and measures again."""
    lab.wait_for_state(phone.hardware_serial, "ready")
    wait_for(lambda: phone.remains() == [], f"the phone is clean: {phone.remains()}")
    step_id = lab.submit(phone)
    assert lab.ended(step_id)["state"] == "succeeded", lab.step(step_id)["error"]
    assert phone.remains() == []


@pytest.mark.parametrize(
    ("faults", "code"),
    [
        ({"lose_after_bytes": 3000}, "device_lost"),
        ({"truncate_push": 3}, "device_lost"),
        ({"disk_full": True}, "device_full"),
        ({"hot": 3}, "device_hot"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_goes_wrong_before_the_tool_starts_is_tried_again(
    lab: Lab, phone: AttachedPhone, neighbour: None, faults: dict[str, Any], code: str
) -> None:
    phone.set_faults(**faults)
    step_id = lab.submit(phone)
    lab.wait_for_attempt(step_id, "failed", code)
    phone.set_faults()
    lab.wait_for_state(phone.hardware_serial, "ready")
    lab.let_time_pass(step_id)
    assert lab.ended(step_id)["state"] == "succeeded"
    assert lab.attempts(step_id) == [("failed", code), ("succeeded", None)]
    assert phone.remains() == []


@pytest.mark.parametrize("fault", ["no_exit_packet", "reboot", "killed"])
def test_a_phone_that_goes_while_the_tool_runs_ends_the_attempt_as_lost(
    lab: Lab, phone: AttachedPhone, neighbour: None, fault: str
) -> None:
    if fault == "no_exit_packet":
        phone.set_faults(no_exit_packet=_RUN)
        step_id = lab.submit(phone)
    else:
        step_id = lab.begin(phone)
        phone.close() if fault == "killed" else (phone.root / "reboot").touch()
    assert lab.ended(step_id)["error"]["code"] == "device_lost"
    # Not a second one, though the error as such passes.
    assert lab.attempts(step_id) == [("lost", "device_lost")]
    phone.set_faults()
    phone.let_go()
    if fault == "killed":
        lab.wait_for_state(phone.hardware_serial, "absent")
        # It is the same phone that comes back, with what the run has left on it.
        assert phone.remains()
        with lab.phone(phone.root.name) as again:
            check_usable(lab, again)
    else:
        check_usable(lab, phone)


def test_a_tool_that_fails_is_no_fault_of_the_phone(lab: Lab, phone: AttachedPhone, neighbour: None) -> None:
    (phone.root / "fail").touch()
    for step_id in [lab.submit(phone) for _ in range(4)]:
        assert lab.ended(step_id)["error"]["code"] == "benchmark_failed"
        assert lab.attempts(step_id) == [("failed", "benchmark_failed")]
    (phone.root / "fail").unlink()
    check_usable(lab, phone)


def test_the_status_that_adb_tells_counts_for_nothing(lab: Lab, phone: AttachedPhone) -> None:
    phone.set_faults(statuses={_RUN: 1})
    check_usable(lab, phone)


def test_a_phone_that_fails_again_and_again_is_given_up_until_it_is_released(
    lab: Lab, phone: AttachedPhone, neighbour: None
) -> None:
    phone.set_faults(disk_full=True)
    for _ in range(3):
        lab.wait_for_attempt(lab.submit(phone), "failed", "device_full")
    found = lab.wait_for_state(phone.hardware_serial, "quarantined")
    assert found["reason"] == "3 benchmarks in a row failed on it; the last time its storage was full."
    (told,) = [each for each in devices.list_devices(lab.database, for_operator=False) if each["id"] == found["id"]]
    assert (told["reason"], told["connections"]) == ("It was given up, until an operator looks at it.", [])
    phone.set_faults()
    waiting = lab.submit(phone)
    devices.release_device(lab.database, phone.hardware_serial)
    assert lab.ended(waiting)["state"] == "succeeded"


def test_a_phone_that_trusts_nobody_waits_for_a_person(lab: Lab, phone: AttachedPhone, neighbour: None) -> None:
    phone.set_faults(auth="refuse")
    lab.detach(phone)
    phone.attach("unauthorized")
    lab.wait_for_state(phone.serial, "unauthorized")
    step_id = lab.submit(phone)
    phone.set_faults()
    lab.adb.command("disconnect", phone.serial)
    phone.attach()
    assert lab.ended(step_id)["state"] == "succeeded"
    assert phone.serial not in lab.devices(), "it goes by its own serial number"


def test_a_phone_that_is_disconnected_without_work_comes_back(lab: Lab, phone: AttachedPhone) -> None:
    lab.detach(phone)
    phone.attach()
    check_usable(lab, phone)


def test_a_worker_killed_in_mid_run_costs_that_run_only(tmp_path: Path) -> None:
    with laboratory(tmp_path) as lab, lab.phone("one") as phone:
        with lab.worker_process() as process:
            step_id = lab.begin(phone)
            children = find_children(process.pid)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            wait_for(lambda: not any(is_alive(pid) for pid in children), "its children are dead")
        assert phone.remains()
        lab.silence(lab.step(step_id)["worker_id"])
        assert lab.state(phone.hardware_serial) == "absent", "nobody follows it"
        with lab.worker():
            assert lab.ended(step_id)["error"]["code"] == "lost"
            assert lab.attempts(step_id) == [("lost", "lost")]
            phone.let_go()
            check_usable(lab, phone)
        assert lab.attempts(step_id) == [("lost", "lost")]


def test_a_phone_that_hangs_is_given_up_and_others_go_on(tmp_path: Path) -> None:
    """One of them has never answered: it is shown by adb's serial number."""
    impatient = {"device_answer_s": 4, "device_process_s": 2, "boot_s": 0.1}
    with (
        laboratory(tmp_path, **impatient) as lab,
        lab.phone("one") as one,
        lab.phone("two") as two,
        lab.phone("three") as three,
    ):
        os.kill(three.process.pid, signal.SIGSTOP)
        with lab.worker():
            lab.wait_for_state(two.hardware_serial, "ready")
            lab.wait_for_state(one.hardware_serial, "ready")
            hung = lab.begin(one)
            os.kill(one.process.pid, signal.SIGSTOP)
            assert lab.ended(hung)["error"]["code"] == "device_hung"
            assert lab.attempts(hung) == [("lost", "device_hung")]
            fine = lab.submit(two)
            assert lab.ended(fine)["state"] == "succeeded"
            for device_id in (one.hardware_serial, three.serial):
                found = lab.wait_for_state(device_id, "quarantined")
                assert found["reason"].startswith("Nothing brought it back: ")
            assert lab.devices()[three.serial]["kind"] == "unknown"
            for phone in (one, three):
                os.kill(phone.process.pid, signal.SIGCONT)
                phone.let_go()
                devices.release_device(lab.database, one.hardware_serial if phone is one else three.serial)
                phone.attach()
            check_usable(lab, one)
            check_usable(lab, three)
            assert three.serial not in lab.devices()
