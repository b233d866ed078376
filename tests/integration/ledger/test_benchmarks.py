"""Benchmarks of what was published before: jobs of their own, that leave everything else as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.errors import Conflict, DeviceLost, IdempotencyMismatch, NotFound, QuotaExceeded
from service.ledger import access, benchmarks, claims, devices, jobs, measurements, quotas, results, views
from service.ledger.database import Database
from service.requests import BenchmarkRequest
from tests.integration.ledger.test_retention import ALL, FILES, Bench
from tests.ledger_invariants import find_violations, read_ledger
from tests.ledger_play import BENCHMARK, POLICY, TENANT, TOOLCHAIN

PHONE = {"kind": "phone", "name": "Pixel 9", "model": "Pixel 9", "soc": "G4", "android": 15, "ram_gib": 12.0}


class Lab(Bench):
    """Something published, and phones to measure it on."""

    def __init__(self, database: Database, folder: Path) -> None:
        super().__init__(database, folder)
        self.job_id = self.finish_job(recipes=["dynamic_int8"], formats=["litertlm"])
        self.artifact_id = self.artifacts(self.job_id)[0]["id"]

    def artifacts(self, job_id: str) -> list[dict[str, Any]]:
        return views.list_artifacts(self.database, TENANT, job_id)

    def attach(self, *device_ids: str) -> None:
        for device_id in device_ids:
            record = {**PHONE, "serial": device_id}
            assert devices.register_device(self.database, self.play.worker_id, device_id, record, [device_id])

    def benchmark(self, *asked: str, key: str | None = None, artifact_id: str | None = None, **fields: Any) -> str:
        request = BenchmarkRequest(devices=asked, **fields)
        wanted = artifact_id or self.artifact_id
        made = benchmarks.submit_benchmark(
            self.database, TENANT, wanted, request, processes=6, idempotency_key=key, traceparent=None
        )
        return made.job_id

    def try_claim(self, device_id: str) -> claims.Claim | None:
        return claims.claim_for_device(self.database, self.play.worker_id, device_id, POLICY)

    def claim(self, device_id: str) -> claims.Claim:
        held = self.try_claim(device_id)
        assert held is not None
        return held

    def measure(self, device_id: str, **figures: Any) -> claims.Claim:
        """Let a phone measure what is due for it."""
        held = self.claim(device_id)
        self.finish(held, {**PHONE, "serial": device_id}, **figures)
        return held

    def finish(self, held: claims.Claim, device: dict[str, Any], **figures: Any) -> None:
        """Finish a benchmark with a measurement of each of its arms, in a document of its own."""
        arms = held.params.get("arms")
        names = [f"measurement-{number}.json" for number, _ in enumerate(arms, 1)] if arms else ["measurement.json"]
        documents = [self.play.put(name, f"{held.step_id} {name}".encode()) for name in names]
        found = [
            {
                "device": device,
                "verdict": "stable",
                **{part: {**held.params, **way}.get(part) for part in ("format", "backend", "threads")},
                **({"document": name} if arms else {}),
                **figures,
            }
            for name, way in zip(names, arms or [{}], strict=True)
        ]
        success = results.Success({"arms": found} if arms else found[0], documents)
        results.finish_step(self.database, held, success, TOOLCHAIN, BENCHMARK)

    def state(self, job_id: str) -> str:
        return str(self.play.job(job_id)["state"])

    def measured(self, artifact_id: str | None = None) -> int:
        return len(measurements.list_measurements(self.database, TENANT, artifact_id or self.artifact_id))

    def require_sound(self) -> None:
        assert find_violations(read_ledger(self.database), self.stored()) == []


@pytest.fixture
def lab(database: Database, tmp_path: Path) -> Lab:
    return Lab(database, tmp_path)


def test_a_measurement_made_later_stands_beside_the_artifact(lab: Lab) -> None:
    lab.attach("A")
    before, artifact = lab.play.job(lab.job_id), views.read_artifact(lab.database, TENANT, lab.artifact_id)
    job_id = lab.benchmark("soc=G4", threads=[2])
    job = lab.play.job(job_id)
    assert (job["state"], [step["kind"] for step in job["steps"]]) == (
        "queued",
        ["bundle", "verify", "reference", "verify", "benchmark"],
    )
    assert [step["reused"] for step in job["steps"]] == [True, True, True, True, False]
    assert (job["request"]["artifact"], job["request"]["formats"]) == (lab.artifact_id, ["litertlm"])
    held = lab.claim("A")
    assert lab.state(job_id) == "running"
    (output,) = held.inputs["artifact"].outputs
    assert output.digest == artifact["sha256"]
    assert {name: held.params[name] for name in ("format", "backend", "threads", "processes")} == {
        "format": "litertlm",
        "backend": "cpu",
        "threads": 2,
        "processes": 6,
    }
    lab.finish(held, {**PHONE, "serial": "A"})
    assert lab.state(job_id) == "succeeded"
    (variant,) = lab.play.job(job_id)["variants"]
    assert (variant["state"], len(variant["measurements"]), variant["artifacts"]) == ("succeeded", 1, [])
    assert lab.measured() == 1
    assert lab.play.job(lab.job_id) == before
    assert views.read_artifact(lab.database, TENANT, lab.artifact_id) == artifact
    lab.require_sound()


def test_it_is_asked_for_as_its_own_job_would_have_asked(lab: Lab) -> None:
    """Equal parameters, whoever asks: the figures can stand beside each other."""
    lab.attach("A")
    submitted = lab.play.submit(
        recipes=["none"], formats=["tflite"], devices=["serial=A"], backends=["cpu", "gpu"], threads=[4]
    )
    lab.play.run_all()
    lab.benchmark(
        "serial=A", backends=["cpu", "gpu"], threads=[4], artifact_id=lab.artifacts(submitted)[0]["id"], priority=-1
    )
    # What was asked for later has the lower priority.
    made, later = (lab.measure("A").params for _ in range(2))
    own = {"processes": None, "threads": None}
    assert {**made, **own} == {**later, **own}
    assert later["signatures"] == ["prefill_8", "decode"]


def test_all_and_several_ways_are_measured_each(lab: Lab) -> None:
    lab.attach("A", "B")
    job_id = lab.benchmark("all", backends=["cpu", "gpu"])
    for device_id in ("A", "B"):
        lab.measure(device_id)
    assert lab.state(job_id) == "succeeded"
    assert lab.measured() == 4


def test_the_host_measures_too(lab: Lab) -> None:
    job_id = lab.benchmark("host")
    assert lab.play.run_all() == ["benchmark"]
    assert lab.state(job_id) == "succeeded"


def test_what_fails_fails_here_alone_and_can_be_tried_again(lab: Lab) -> None:
    lab.attach("A", "B")
    job_id = lab.benchmark("serial=A", "serial=B")
    lab.measure("A")
    held = lab.claim("B")
    claims.pin_attempt(lab.database, held)
    lab.play.fail(held, DeviceLost("gone"))
    assert lab.state(job_id) == "partial"
    assert lab.state(lab.job_id) == "succeeded"
    jobs.retry_job(lab.database, TENANT, job_id)
    assert lab.try_claim("A") is None, "A has measured it"
    lab.measure("B")
    assert (lab.state(job_id), lab.measured()) == ("succeeded", 2)
    lab.require_sound()


def test_a_job_without_one_measurement_has_failed(lab: Lab) -> None:
    lab.attach("A")
    job_id = lab.benchmark("serial=A")
    held = lab.claim("A")
    claims.pin_attempt(lab.database, held)
    assert not lab.play.fail(held, DeviceLost("gone")), "what has started is not repeated by itself"
    (variant,) = lab.play.job(job_id)["variants"]
    assert (lab.state(job_id), variant["error"]["code"]) == ("failed", "device_lost")
    assert lab.measured() == 0


def test_it_can_be_cancelled_and_cancels_nothing_else(lab: Lab) -> None:
    job_id = lab.benchmark("any")
    jobs.cancel_job(lab.database, TENANT, job_id)
    assert lab.play.step_states(job_id) == {
        "bundle": ["succeeded"],
        "verify": ["succeeded", "succeeded"],
        "reference": ["succeeded"],
        "benchmark": ["cancelled"],
    }
    jobs.retry_job(lab.database, TENANT, job_id)
    lab.attach("A")
    lab.measure("A")
    assert lab.state(job_id) == "succeeded"
    lab.require_sound()


def test_its_bytes_stay_while_it_waits(lab: Lab) -> None:
    """Control: once nothing waits for them they go."""
    job_id = lab.benchmark("any")
    lab.remove(lab.job_id)
    lab.sweep(ALL)
    lab.attach("A")
    held = lab.claim("A")
    (output,) = held.inputs["artifact"].outputs
    assert output.digest in lab.stored()
    lab.finish(held, PHONE)
    lab.sweep(ALL)
    lab.sweep(ALL)
    assert output.digest not in lab.stored()
    with pytest.raises(NotFound):
        lab.measured()
    with pytest.raises(NotFound):
        lab.play.job(job_id)
    lab.require_sound()


def test_what_was_published_long_ago_is_measured_as_well(lab: Lab) -> None:
    """The step is retired, the artifact is there."""
    lab.sweep(FILES)
    lab.attach("A")
    job_id = lab.benchmark("any")
    lab.sweep(FILES)
    lab.measure("A")
    assert (lab.state(job_id), lab.measured()) == ("succeeded", 1)


def test_a_measurement_is_kept_as_long_as_artifacts_are(lab: Lab) -> None:
    """Its job published nothing, but what it found belongs to an artifact."""
    unpublished = type(ALL)(outputs_s=0, uploads_s=0, unpublished_jobs_s=0, published_jobs_s=1e9, wait_s=0)
    lab.attach("A")
    lab.benchmark("any")
    lab.measure("A")
    failed = lab.benchmark("any")
    jobs.cancel_job(lab.database, TENANT, failed)
    lab.sweep(unpublished)
    assert lab.measured() == 1
    with pytest.raises(NotFound):
        lab.play.job(failed)


def test_a_deleted_job_takes_its_measurement_along(lab: Lab) -> None:
    lab.attach("A")
    job_id = lab.benchmark("any")
    lab.measure("A")
    lab.remove(job_id)
    assert lab.measured() == 0
    lab.sweep(ALL)
    lab.sweep(ALL)


def test_after_the_artifact_nothing_can_be_measured_of_it(lab: Lab) -> None:
    job_id = lab.benchmark("any")
    jobs.cancel_job(lab.database, TENANT, job_id)
    lab.remove(lab.job_id)
    with pytest.raises(NotFound):
        lab.benchmark("any")
    with pytest.raises(Conflict, match="gone"):
        jobs.retry_job(lab.database, TENANT, job_id)


def test_quotas_and_keys_hold(lab: Lab) -> None:
    first = lab.benchmark("any", key="nightly")
    assert lab.benchmark("any", key="nightly") == first
    with pytest.raises(IdempotencyMismatch):
        lab.benchmark("host", key="nightly")
    quotas.set_quotas(lab.database, TENANT, {"unfinished_jobs": 1})
    with pytest.raises(QuotaExceeded):
        lab.benchmark("any")
    jobs.cancel_job(lab.database, TENANT, first)
    lab.benchmark("any")


def test_another_tenant_s_artifact_is_none(lab: Lab) -> None:
    access.ensure_tenant(lab.database, "stranger")
    request = BenchmarkRequest(devices=("any",))
    with pytest.raises(NotFound):
        benchmarks.submit_benchmark(lab.database, "stranger", lab.artifact_id, request, processes=6)
