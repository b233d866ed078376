"""What the ledger knows of memory: the tenant's own measurements on phones, and what phones had to give."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import InvalidRequest, NotFound
from service.ledger import access, peaks
from service.ledger.database import Database
from tests.integration.ledger.test_benchmarks import Lab
from tests.ledger_play import TENANT


@pytest.fixture
def lab(database: Database, tmp_path: Path) -> Lab:
    made = Lab(database, tmp_path)
    made.attach("A", "B")
    return made


def conditions(available_bytes: int) -> dict[str, dict[str, int]]:
    return {"before": {"memory_available_bytes": available_bytes}}


def test_the_newest_measurement_comes_first_and_says_what_a_phone_has(lab: Lab) -> None:
    lab.benchmark("serial=A")
    lab.measure("A", peak_rss_bytes=10, conditions=conditions(100))
    lab.benchmark("serial=A", backends=["gpu"])
    lab.measure("A", peak_rss_bytes=20, peak_pss_bytes=None, ran_on="cpu", conditions=conditions(200))
    found = peaks.read_evidence(lab.database, TENANT, lab.artifact_id, None)
    assert [(peak.device_id, peak.kind, dict(peak.figures)) for peak in found.peaks] == [
        ("A", "phone", {"peak_rss_bytes": 20}),
        ("A", "phone", {"peak_rss_bytes": 10}),
    ]
    assert found.peaks[0].backend == "cpu", "where it really ran"
    assert {peak.shape for peak in found.peaks} == {found.shape}
    assert {each["id"]: each["memory_available_bytes"] for each in found.devices} == {"A": 200, "B": None}


def test_devices_are_selected_as_a_job_selects_them(lab: Lab) -> None:
    found = peaks.read_evidence(lab.database, TENANT, lab.artifact_id, "serial=B,kind=phone")
    assert [each["id"] for each in found.devices] == ["B"]
    with pytest.raises(InvalidRequest, match="selects no device"):
        peaks.read_evidence(lab.database, TENANT, lab.artifact_id, "host")


def test_another_tenant_s_measurements_tell_nothing(lab: Lab) -> None:
    lab.benchmark("serial=A")
    lab.measure("A", peak_rss_bytes=10, conditions=conditions(100))
    access.ensure_tenant(lab.database, "stranger")
    with pytest.raises(NotFound):
        peaks.read_evidence(lab.database, "stranger", lab.artifact_id, None)
