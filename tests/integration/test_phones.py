"""The adb room on a virtual phone: the real adb server between them, and every fault with its type."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.errors import (
    AdbUnavailable,
    DeviceFull,
    DeviceHot,
    DeviceHung,
    DeviceLost,
    DeviceUnauthorized,
    EdgeKilnError,
)
from tests.kiln import is_alive, wait_for
from tests.services import free_port
from tests.virtual_phone.bench import AdbServer, AttachedPhone, adb_server, virtual_phone
from workers.devices import recovery, traces
from workers.devices.adb import Adb, Phone, check_serial, quote
from workers.devices.android import find_big_cores, read_conditions, read_record
from workers.devices.phone import prepare
from workers.devices.recovery import recover


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdbServer]:
    with adb_server(tmp_path_factory.mktemp("adb")) as started:
        yield started


@pytest.fixture
def attached(server: AdbServer, tmp_path: Path) -> Iterator[AttachedPhone]:
    with virtual_phone(server, tmp_path / "phone") as phone:
        yield phone


@pytest.fixture
def phone(server: AdbServer, attached: AttachedPhone) -> Phone:
    return Adb("127.0.0.1", server.port).phone(attached.serial)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_words_arrive_as_they_are(phone: Phone) -> None:
    words = ["a b", "$HOME", "'", '"', "*", "-n", "\\", "ü", ";exit 3"]
    assert phone.read(f"for word in {quote(*words)}; do printf '%s\\n' \"$word\"; done").split("\n")[:-1] == words
    assert phone.run("exit 7").status == 7
    assert phone.run("echo said >&2").stderr == "said\n"


@pytest.mark.parametrize("serial", ["-P", "", "a;b", "a\nb", "$(x)"])
def test_a_serial_number_that_is_none_is_refused(serial: str) -> None:
    with pytest.raises(DeviceLost):
        check_serial(serial)


def test_a_phone_says_what_it_is_and_how_it_is(phone: Phone, attached: AttachedPhone) -> None:
    record = read_record(phone)
    assert (record["kind"], record["serial"], record["soc"]) == ("virtual", attached.hardware_serial, "VIRT1")
    assert record["clusters"] == [{"max_khz": 1_800_000, "cores": [0, 1]}, {"max_khz": 3_000_000, "cores": [2]}]
    assert find_big_cores(record) == "4"
    conditions = read_conditions(phone)
    assert (conditions["thermal_status"], conditions["battery_c"], conditions["plugged"]) == (0, 28.7, ["usb"])
    assert conditions["temperatures_c"] == {"skin": 31.5}
    assert conditions["airplane_mode"] is False
    assert conditions["boot_id"] == record["boot_id"]


def test_the_exit_status_is_the_phones_own(phone: Phone, attached: AttachedPhone) -> None:
    attached.set_faults(statuses={"true": 0, "exit 5": 0})
    assert phone.run("exit 5").status == 5


@pytest.mark.parametrize(
    ("faults", "error"),
    [
        ({"lose_after_bytes": 40}, DeviceLost),
        ({"no_exit_packet": "echo"}, DeviceLost),
        ({"stall": "echo"}, DeviceHung),
        ({"hang": True}, DeviceHung),
        ({"reboot_on": "echo", "reboot_s": 0}, DeviceLost),
    ],
)
def test_less_than_a_whole_answer_is_none(
    phone: Phone, attached: AttachedPhone, faults: dict[str, object], error: type[EdgeKilnError]
) -> None:
    assert phone.read("echo whole") == "whole\n"
    attached.set_faults(**faults)
    with pytest.raises(error):
        phone.run("echo whole; sleep 1", deadline_s=3)


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(AdbUnavailable):
        Adb("127.0.0.1", free_port()).states()


def test_a_file_arrives_whole_or_is_none(phone: Phone, attached: AttachedPhone, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.write_bytes(bytes(range(256)) * 1000)
    right = digest(source.read_bytes())
    target = "/data/local/tmp/edgekiln/model"
    traces.push_checked(phone, source, target, right)
    attached.set_faults(truncate_push=1000)
    with pytest.raises(DeviceLost, match="damaged"):
        traces.push_checked(phone, source, target, right)
    attached.set_faults(disk_full=True)
    with pytest.raises(DeviceFull):
        traces.push_checked(phone, source, target, right)
    with pytest.raises(DeviceFull) as caught:
        traces.require_room(phone, source.stat().st_size)
    assert caught.value.details["free_bytes"] == 0
    attached.set_faults(lose_after_bytes=100_000)
    with pytest.raises(DeviceLost):
        traces.push_checked(phone, source, target, right)


def test_a_tool_is_brought_once(phone: Phone, attached: AttachedPhone, tmp_path: Path) -> None:
    (tmp_path / "tool").write_text("#!/bin/sh\necho ran\n")
    files = {"tool": digest((tmp_path / "tool").read_bytes())}
    home, is_new = traces.place_tool(phone, tmp_path, files)
    assert is_new
    assert phone.read(f"{home}/tool") == "ran\n"
    assert traces.place_tool(phone, tmp_path, files) == (home, False)
    # Damaged on the phone, it is brought again.
    phone.read(f"echo x >> {home}/tool")
    assert traces.place_tool(phone, tmp_path, files) == (home, True)


def test_a_phone_is_left_as_it_was_also_by_a_worker_that_died(phone: Phone, attached: AttachedPhone) -> None:
    setting = attached.root / "settings" / "stay_on_while_plugged_in"
    setting.write_text("3\n")
    traces.open_run(phone, "step_1-1")
    folder = traces.run_dir("step_1-1")
    # As a run leaves it that nobody ends.
    phone.read(f"cp /bin/sleep {folder}/tool; {folder}/tool 1000 > /dev/null 2>&1 & echo $! > {folder}/pid")
    pid = int((attached.root / folder.lstrip("/") / "pid").read_text())
    assert setting.read_text() == "7\n"
    assert is_alive(pid)
    traces.close_runs(phone)
    wait_for(lambda: not is_alive(pid), "the process is dead")
    assert setting.read_text() == "3\n"
    assert attached.files() == []


def test_somebody_elses_process_is_not_killed(phone: Phone, attached: AttachedPhone) -> None:
    """The number that was written down may be another's by now."""
    traces.open_run(phone, "step_1-1")
    pid = int(phone.read("sleep 1000 > /dev/null 2>&1 & echo $!"))
    phone.read(f"echo {pid} > {traces.run_dir('step_1-1')}/pid")
    traces.close_runs(phone)
    assert is_alive(pid)


def test_a_setting_that_was_not_set_is_so_again(phone: Phone, attached: AttachedPhone) -> None:
    """It reads as `null`, and would be set to that word."""
    setting = attached.root / "settings" / "stay_on_while_plugged_in"
    setting.unlink()
    traces.open_run(phone, "step_1-1")
    assert setting.exists()
    traces.close_runs(phone)
    assert not setting.exists()


def test_the_hosts_program_switches_the_power_between_connecting_and_rebooting(
    phone: Phone, attached: AttachedPhone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the serial number as one word; a phone that only its power brings back is not rebooted."""
    program = tmp_path / "switch"
    program.write_text(
        f'#!/bin/sh\n[ $# -eq 1 ] || exit 1\necho "$1" > {tmp_path}/switched\nrm {attached.root}/faults.json\n'
    )
    program.chmod(0o755)
    impatient = Adb(phone.adb.host, phone.adb.port, answer_s=1).phone(phone.serial)
    boot_id = read_record(phone)["boot_id"]
    attached.set_faults(stall="boot_completed")
    # What comes before is given no time, what helps as much as it takes.
    monkeypatch.setattr(recovery, "_RECONNECT_S", 0)
    assert recover(impatient, boot_s=60, power_cycle_program=str(program)) == "power-cycle"
    assert (tmp_path / "switched").read_text() == f"{attached.serial}\n"
    assert read_record(phone)["boot_id"] == boot_id
    # One that does not work is no reason to stop.
    program.write_text("#!/bin/sh\nexit 3\n")
    attached.set_faults(stall="boot_completed", reboot_s=0)
    with pytest.raises((DeviceHung, DeviceLost)):
        recover(impatient, boot_s=0.1, power_cycle_program=str(program))
    wait_for(lambda: attached.boot_id() != boot_id, "it has been rebooted")


def test_another_phones_run_may_be_on_one_that_nobody_knows(phone: Phone, attached: AttachedPhone) -> None:
    """Only its connection is touched."""
    impatient = Adb(phone.adb.host, phone.adb.port, answer_s=1).phone(phone.serial)
    boot_id = attached.boot_id()
    attached.set_faults(stall="boot_completed")
    with pytest.raises((DeviceHung, DeviceLost)):
        recover(impatient, boot_s=0.1, power_cycle_program="/bin/false", is_gentle=True)
    assert attached.boot_id() == boot_id


def test_a_hot_phone_is_not_measured(phone: Phone, server: AdbServer, attached: AttachedPhone, tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "model.litertlm").write_bytes(b"model")
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "litert_lm_advanced_main").write_bytes(b"tool")
    params = {
        "format": "litertlm",
        "phone": {
            "adb_host": "127.0.0.1",
            "adb_port": server.port,
            "answer_s": 20,
            "process_deadline_s": 60,
            "serial": attached.serial,
            "record": read_record(phone),
            "run": "step_1-1",
            "cool_down_s": 0,
            "tool": {"name": "litert_lm_advanced_main", "files": {"litert_lm_advanced_main": digest(b"tool")}},
        },
    }
    inputs = {"artifact": tmp_path / "artifact", "tool": tmp_path / "tool"}
    attached.set_faults(hot=3)
    with pytest.raises(DeviceHot, match="severe"):
        prepare(params, inputs, tmp_path, lambda message, fraction=None: None)
    attached.set_faults()
    assert prepare(params, inputs, tmp_path, lambda message, fraction=None: None)["tool_was_new"] is False
    # Another phone at the same address is not the one that was leased.
    params["phone"]["record"] = {**params["phone"]["record"], "serial": "another"}  # type: ignore[index]
    with pytest.raises(DeviceLost, match="is now the phone"):
        prepare(params, inputs, tmp_path, lambda message, fraction=None: None)


def test_a_phone_that_comes_back_is_used_again(phone: Phone, server: AdbServer, attached: AttachedPhone) -> None:
    assert recover(phone, boot_s=1) == "look"
    server.command("disconnect", attached.serial)
    assert recover(phone, boot_s=1) in ("reconnect", "connect")


def test_a_phone_that_trusts_nobody_is_left_to_a_person(
    phone: Phone, server: AdbServer, attached: AttachedPhone
) -> None:
    attached.set_faults(auth="refuse")
    server.command("disconnect", attached.serial)
    attached.attach("unauthorized")
    with pytest.raises(DeviceUnauthorized):
        recover(phone, boot_s=0)
