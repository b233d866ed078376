"""The device worker on real adb: what comes, goes, and hangs twice is in the ledger as it is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.ledger import devices
from service.settings import Settings
from tests.kiln import wait_for
from tests.virtual_phone.bench import AdbServer, adb_server, virtual_phone
from workers.device_worker import DeviceWorker
from workers.devices import traces
from workers.devices.adb import Adb


@pytest.fixture
def server(tmp_path: Path) -> Iterator[AdbServer]:
    with adb_server(tmp_path / "adb") as started:
        yield started


@pytest.fixture
def worker(server: AdbServer, tmp_path: Path) -> Iterator[DeviceWorker]:
    settings = Settings(data_dir=tmp_path / "data", adb_port=server.port, device_poll_s=0.1, boot_s=0.1)
    worker = DeviceWorker(settings)
    thread = threading.Thread(target=worker.run)
    thread.start()
    yield worker
    worker.shut_down()
    thread.join()


def states(worker: DeviceWorker) -> dict[str, Any]:
    found = devices.list_devices(worker.process.database)
    return {device["id"]: device["state"] for device in found if device["kind"] != "host"}


def test_phones_come_clean_and_go(worker: DeviceWorker, server: AdbServer, tmp_path: Path) -> None:
    with virtual_phone(server, tmp_path / "one") as one, virtual_phone(server, tmp_path / "two") as two:
        both = {one.hardware_serial: "ready", two.hardware_serial: "ready"}
        wait_for(lambda: states(worker) == both, "both are ready")
        one.close()
        wait_for(lambda: states(worker)[one.hardware_serial] == "absent", "the lost one is absent")
        assert states(worker)[two.hardware_serial] == "ready"


def test_what_a_crashed_worker_left_is_taken_away(server: AdbServer, tmp_path: Path, request: Any) -> None:
    with virtual_phone(server, tmp_path / "one") as one:
        traces.open_run(Adb("127.0.0.1", server.port).phone(one.serial), "step_1-1")
        assert one.files()
        request.getfixturevalue("worker")
        wait_for(lambda: one.files() == [], "the phone is clean")


def test_a_phone_that_hangs_here_twice_is_one_and_its_run_is_left_alone(
    worker: DeviceWorker, server: AdbServer, tmp_path: Path
) -> None:
    with virtual_phone(server, tmp_path / "one") as one:
        wait_for(lambda: states(worker) == {one.hardware_serial: "ready"}, "it is ready")
        traces.open_run(Adb("127.0.0.1", server.port).phone(one.serial), "step_1-1")
        server.command("connect", one.serial.replace("127.0.0.1", "localhost"))
        wait_for(lambda: len(server.states()) == 2, "it hangs here twice")
        wait_for(lambda: len(worker._keepers) == 2, "the worker has seen both")
        second = worker._keepers[one.serial.replace("127.0.0.1", "localhost")]
        wait_for(lambda: second.look_count >= 2, "it has looked at the phone")
        assert one.files(), "the run is still there"
        (device,) = [each for each in devices.list_devices(worker.process.database) if each["kind"] != "host"]
        assert device["connections"] == [one.serial]
