"""A new version of a tool measures what older ones have measured: once, the newest, where a phone is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import Conflict
from service.ledger import devices, measurements, quotas, tools, uploads, views
from service.ledger.database import Database
from service.ledger.rebenchmarks import Rebenchmarks, start_rebenchmarks
from service.ledger.states import DeviceState
from tests.integration.ledger.test_benchmarks import PHONE, Lab
from tests.ledger_play import TENANT

NAME, ABI = "litert_lm_advanced_main", "arm64-v8a"


class Workshop(Lab):
    """A lab with versions of a tool."""

    version = "1"

    def add_tool(self, version: str) -> None:
        file = self.play.put(NAME, f"{NAME} {version}".encode())
        uploads.enter_upload(self.database, TENANT, file, NAME)
        tools.add_tool(self.database, TENANT, NAME, version, ABI, {NAME: file.digest})
        self.version = version

    def work(self, *device_ids: str) -> int:
        """Let phones measure all that is due, with the version that phones get; return how much it was."""
        count = 0
        for device_id in device_ids:
            while (held := self.try_claim(device_id)) is not None:
                tool = {"name": NAME, "version": self.version, "abi": ABI}
                self.finish(held, {**PHONE, "serial": device_id, "tool": tool})
                count += 1
        return count

    def start(self, version: str | None = None) -> Rebenchmarks:
        return start_rebenchmarks(self.database, NAME, version or self.version, ABI, processes=6)

    def versions(self, artifact_id: str) -> list[str]:
        found = measurements.list_measurements(self.database, TENANT, artifact_id)
        return [one["device"]["tool"]["version"] for one in found]


@pytest.fixture
def lab(database: Database, tmp_path: Path) -> Workshop:
    made = Workshop(database, tmp_path)
    made.add_tool("1")
    made.attach("A", "B")
    return made


def test_what_an_older_version_measured_is_measured_with_the_new_one_once(lab: Workshop) -> None:
    lab.benchmark("serial=A", backends=["cpu", "gpu"], threads=[2])
    assert lab.work("A", "B") == 1, "two arms of one run"
    assert lab.start() == Rebenchmarks(started=0, known=2, away=0, refused=0), "nothing is older"
    lab.add_tool("2")
    assert lab.start() == Rebenchmarks(started=2, known=0, away=0, refused=0)
    assert lab.start() == Rebenchmarks(started=0, known=2, away=0, refused=0)
    assert [job["priority"] for job in views.list_jobs(lab.database, TENANT)][:2] == [-100, -100]
    assert lab.work("A", "B") == 2
    assert lab.start() == Rebenchmarks(started=0, known=2, away=0, refused=0)
    assert lab.versions(lab.artifact_id) == ["1", "1", "2", "2"]
    ways = [
        (one["device"]["serial"], one["backend"], one["threads"])
        for one in measurements.list_measurements(lab.database, TENANT, lab.artifact_id)
    ]
    assert sorted(ways[:2], key=str) == sorted(ways[2:], key=str) == [("A", "cpu", 2), ("A", "gpu", None)]


def test_of_each_model_the_newest_artifact_is_measured(lab: Workshop) -> None:
    """The newest that was measured in that way; another variant or model is another."""
    newer = lab.artifacts(lab.finish_job(recipes=["dynamic_int8"], formats=["litertlm"]))[0]["id"]
    variant = lab.artifacts(lab.finish_job(recipes=["none"], formats=["litertlm"]))[0]["id"]
    model = lab.artifacts(lab.finish_job(path="/models/other", recipes=["none"], formats=["litertlm"]))[0]["id"]
    for artifact_id in (lab.artifact_id, newer, variant, model):
        lab.benchmark("serial=A", artifact_id=artifact_id)
    lab.benchmark("serial=B")
    lab.work("A", "B")
    lab.add_tool("2")
    assert lab.start().started == 4
    lab.work("A", "B")
    assert lab.versions(newer) == lab.versions(variant) == lab.versions(model) == ["1", "2"]
    assert lab.versions(lab.artifact_id) == ["1", "1", "2"], "on B alone: there it is the newest that was measured"


def test_a_phone_that_is_away_is_left_out_until_it_is_back(lab: Workshop) -> None:
    lab.benchmark("serial=A")
    lab.work("A")
    lab.add_tool("2")
    devices.tell_state(lab.database, lab.play.worker_id, "A", DeviceState.ABSENT, "gone", [])
    assert lab.start() == Rebenchmarks(started=0, known=0, away=1, refused=0)
    lab.attach("A")
    assert lab.start() == Rebenchmarks(started=1, known=0, away=0, refused=0)


def test_a_tenant_s_quota_holds(lab: Workshop) -> None:
    lab.benchmark("serial=A", backends=["cpu", "gpu"])
    lab.work("A")
    lab.add_tool("2")
    quotas.set_quotas(lab.database, TENANT, {"unfinished_jobs": 1})
    assert lab.start() == Rebenchmarks(started=1, known=0, away=0, refused=1)
    lab.work("A")
    assert lab.start() == Rebenchmarks(started=1, known=1, away=0, refused=0)


def test_what_will_be_measured_with_it_anyway_is_not_started(lab: Workshop) -> None:
    lab.benchmark("serial=A")
    lab.work("A")
    lab.add_tool("2")
    lab.benchmark("serial=A")
    assert lab.start() == Rebenchmarks(started=0, known=1, away=0, refused=0)


def test_one_that_measures_with_the_old_version_still_does_not_count(lab: Workshop) -> None:
    """Control of the one above."""
    lab.benchmark("serial=A")
    lab.work("A")
    lab.benchmark("serial=A")
    assert lab.claim("A")
    lab.add_tool("2")
    assert lab.start() == Rebenchmarks(started=1, known=0, away=0, refused=0)


def test_an_older_version_and_an_unknown_one_start_nothing(lab: Workshop) -> None:
    lab.add_tool("2")
    for version in ("1", "3"):
        with pytest.raises(Conflict, match=f"Phones get {NAME} 2"):
            lab.start(version)
