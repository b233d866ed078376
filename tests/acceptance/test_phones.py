"""Phones, as a user sees them: `edgekiln up`, a device worker, two virtual phones, and what the commands print."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.ledger.tables import Attempt
from tests.acceptance.conftest import EXAMPLE, Conversion, Document
from tests.kiln import Kiln, fired_up, wait_for
from tests.virtual_phone.bench import AttachedPhone, adb_server, virtual_phone
from tests.virtual_phone.tools import TOOLS, write_tool

VERSION = "9.8.7"


@dataclass(frozen=True)
class Bench:
    """A running installation with two phones."""

    kiln: Kiln
    phones: tuple[AttachedPhone, AttachedPhone]
    #: While this folder is there, the tools wait in it for each other: no phone's run ends before the other's began.
    meeting: Path

    def edgekiln(self, *arguments: str) -> str:
        """Run a command against the server; return what it prints."""
        command = [sys.executable, "-m", "service.cli", *arguments]
        environment = {**self.kiln.environment, "EDGEKILN_URL": self.kiln.client.url, "COLUMNS": "200"}
        done = subprocess.run(command, env=environment, cwd=self.kiln.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, device: str) -> tuple[Document, str]:
        """Measure the example's smallest bundle; return the job and what was printed."""
        asked = ["--recipe", "dynamic_int8", "--format", "litertlm", "--device", device]
        printed = self.edgekiln("submit", str(EXAMPLE), *asked, "--wait")
        (newest, *_) = json.loads(self.edgekiln("jobs", "--json"))
        job: Document = json.loads(self.edgekiln("job", newest["id"], "--json"))
        return job, printed


@pytest.fixture(scope="module")
def bench(conversion: Conversion, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The example is converted already; phones, worker and tools are there as docs/devices.md says."""
    folder = tmp_path_factory.mktemp("phones")
    shutil.copytree(conversion.data_dir, folder / "data")
    with (
        adb_server(folder / "adb") as adb,
        virtual_phone(adb, folder / "one") as one,
        virtual_phone(adb, folder / "two") as two,
        fired_up(folder, EXAMPLE.parent, adb_port=adb.port, device_poll_s=0.2) as kiln,
    ):
        made = Bench(kiln, (one, two), folder / "meeting")
        for name in TOOLS:
            tool = write_tool(folder / "tools", name, made.meeting)
            made.edgekiln("tools", "add", name, str(tool), "--version", VERSION, "--abi", "x86_64")
        with (folder / "device-worker.log").open("wb") as log:
            words = [*kiln.program, "device-worker"]
            worker = subprocess.Popen(words, env=kiln.environment, cwd=folder, stdout=log, stderr=log)
        kiln.also_wait_for(worker)
        ready = {phone.hardware_serial: "ready" for phone in (one, two)}
        wait_for(
            lambda: ready == {each["id"]: each["state"] for each in kiln.client.devices() if each["kind"] == "virtual"},
            "both phones are ready",
        )
        yield made


def test_a_job_on_any_phone_ends_with_a_labelled_measurement_beside_the_artifact(bench: Bench, tmp_path: Path) -> None:
    job, printed = bench.submit("any")
    assert job["state"] == "succeeded"
    (found,) = job["variants"][0]["measurements"]
    assert found["device"]["kind"] == "virtual"
    assert found["device"]["serial"] in {phone.hardware_serial for phone in bench.phones}
    assert (found["device"]["tool"]["name"], found["device"]["tool"]["version"]) == ("litert_lm_advanced_main", VERSION)
    for figure in ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s", "init_s"):
        assert found[figure]["median"] > 0, figure
    assert found["verdict"] in printed
    assert printed.count("(virtual)") == 1
    assert VERSION in printed
    assert f"{found['decode_tokens_per_s']['median']:,.0f}" in printed

    bench.edgekiln("download", job["id"], "--output", str(tmp_path))
    (artifact,) = tmp_path.rglob("*.litertlm")
    (path,) = artifact.parent.glob(f"{artifact.name}.*.measurement.json")
    document = json.loads(path.read_text())
    assert document["device"] == found["device"]
    assert all(sample["log"] for capture in document["captures"] for sample in capture["samples"])
    assert [phone.remains() for phone in bench.phones] == [[], []]


def test_two_phones_work_side_by_side(bench: Bench) -> None:
    bench.meeting.mkdir()
    job, printed = bench.submit("all")
    assert job["state"] == "succeeded"
    found = job["variants"][0]["measurements"]
    assert {each["device"]["serial"] for each in found} == {phone.hardware_serial for phone in bench.phones}
    assert printed.count("(virtual)") == 2
    # What the ledger says: each run began before the other one had ended.
    steps = [step["id"] for step in job["steps"] if step["kind"] == "benchmark"]
    runs = [attempt for step_id in steps for attempt in bench.kiln.rows(Attempt, step_id=step_id)]
    assert [run["state"] for run in runs] == ["succeeded", "succeeded"]
    assert max(run["started_at"] for run in runs) < min(run["finished_at"] for run in runs)


def test_what_was_published_is_measured_later_and_again_by_a_newer_tool(bench: Bench, tmp_path: Path) -> None:
    client, (one, _) = bench.kiln.client, bench.phones
    made = next(job for job in client.list(["succeeded"]) if "litertlm" in job["request"]["formats"])
    artifact = next(each for each in client.artifacts(made["id"]) if each["name"].endswith("-dynamic_int8.litertlm"))
    before = client.get(made["id"])
    here = f"serial={one.hardware_serial}"
    printed = bench.edgekiln("benchmark", artifact["id"], "--device", here, "--threads", "2", "--wait")
    assert printed.count("(virtual)") == 1
    assert VERSION in printed

    newer = write_tool(tmp_path, "litert_lm_advanced_main", bench.meeting)
    begun = client.rebenchmark(newer.name, "9.9.0", "x86_64", {newer.name: newer})
    assert begun["started"] >= 1
    assert (begun["away"], begun["refused"]) == (0, 0)
    for job in list(client.list()):
        assert client.wait(job["id"])["state"] == "succeeded"
    versions = [
        each["device"]["tool"]["version"]
        for each in client.measurements(artifact["id"])
        if (each["device"]["serial"], each["threads"]) == (one.hardware_serial, 2)
    ]
    assert versions == [VERSION, "9.9.0"]
    assert client.get(made["id"]) == before
    (told,) = client.fit(artifact["id"], here)["devices"]
    assert (told["kind"], told["basis"]) == ("virtual", "device")
    assert told["predicted"]["peak_rss_bytes"]["low"] > 0
    assert [phone.remains() for phone in bench.phones] == [[], []]
