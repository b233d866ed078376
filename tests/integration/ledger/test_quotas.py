"""Quotas: what one tenant may have at once, and nothing that was accepted is lost by them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from service.errors import NotFound, QuotaExceeded
from service.ledger import claims, jobs, locks, quotas, schedules
from service.ledger.blobs import OutputFile
from service.ledger.database import Database, Transaction
from service.ledger.due import find_due_steps
from service.ledger.uploads import enter_upload
from service.schedules import ScheduleRequest
from tests.ledger_play import TENANT, Play


@pytest.fixture
def play(database: Database) -> Play:
    return Play(database)


def used(play: Play, name: str) -> int:
    (tenant,) = [each for each in quotas.list_tenants(play.database) if each["id"] == play.tenant_id]
    return int(tenant["quotas"][name]["used"])


def test_jobs_beyond_the_quota_are_refused_with_number_and_limit(play: Play) -> None:
    quotas.set_quotas(play.database, TENANT, {"unfinished_jobs": 2})
    first = play.submit("/models/a")
    play.submit("/models/b")
    with pytest.raises(QuotaExceeded, match="has 2 unfinished jobs, and its quota is 2") as refused:
        play.submit("/models/c")
    assert refused.value.details == {"quota": "unfinished_jobs", "used": 2, "limit": 2}
    jobs.cancel_job(play.database, TENANT, first)
    play.submit("/models/c")
    with pytest.raises(QuotaExceeded):
        jobs.retry_job(play.database, TENANT, first)


def test_control_without_a_quota_nothing_is_refused(play: Play) -> None:
    quotas.set_quotas(play.database, TENANT, {"unfinished_jobs": 1})
    quotas.set_quotas(play.database, TENANT, {"unfinished_jobs": None})
    for number in range(3):
        play.submit(f"/models/{number}")
    assert used(play, "unfinished_jobs") == 3


def test_one_tenants_quota_is_no_other_tenants(play: Play) -> None:
    quotas.set_quotas(play.database, TENANT, {"unfinished_jobs": 0, "running_steps": 0, "stored_bytes": 0})
    other = Play(play.database, "other", "host-b")
    job_id = other.submit()
    other.run_all()
    assert other.job(job_id)["state"] == "succeeded"


def test_submissions_that_race_do_not_pass_the_quota(play: Play) -> None:
    quotas.set_quotas(play.database, TENANT, {"unfinished_jobs": 5})

    def submit(number: int) -> bool:
        try:
            play.submit(f"/models/{number}")
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        accepted = list(pool.map(submit, range(12)))
    assert accepted.count(True) == 5
    assert used(play, "unfinished_jobs") == 5


def test_steps_beyond_the_quota_wait_and_all_run_in_the_end(play: Play) -> None:
    quotas.set_quotas(play.database, TENANT, {"running_steps": 1})
    job_id = play.submit()
    play.submit("/models/other")
    held = play.claim("fetch")
    assert held
    # Of whatever class, on whatever host.
    assert play.claim(worker_id=play.add_worker("host-b")) is None
    play.finish(held)
    play.run_all()
    assert play.job(job_id)["state"] == "succeeded"


def test_claims_that_race_on_many_hosts_do_not_pass_the_quota(play: Play) -> None:
    quotas.set_quotas(play.database, TENANT, {"running_steps": 3})
    for number in range(12):
        play.submit(f"/models/{number}")
    workers = [play.add_worker(f"host-{number}", {"fetch": 12}) for number in range(4)]

    def claim_what_there_is(worker_id: str) -> int:
        held = 0
        while play.claim("fetch", worker_id=worker_id) is not None:
            held += 1
        return held

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(claim_what_there_is, workers)) == 3
    assert used(play, "running_steps") == 3
    assert claims.due_classes(play.database) == ["fetch"]


def test_stored_bytes_count_each_content_once_and_refuse_what_would_add_more(play: Play) -> None:
    job_id = play.submit(formats=["tflite"], recipes=["none"])
    play.run_all()
    outputs = used(play, "stored_bytes")
    # `fetch`, `convert` and `quantize` made ten bytes each.
    assert outputs == 30
    text = OutputFile("text", "a" * 64, 12)
    for _ in range(2):
        enter_upload(play.database, TENANT, text, None)
    assert used(play, "stored_bytes") == outputs + 12
    quotas.set_quotas(play.database, TENANT, {"stored_bytes": outputs + 13})
    play.submit("/models/other")
    quotas.set_quotas(play.database, TENANT, {"stored_bytes": outputs + 12})
    with pytest.raises(QuotaExceeded, match="stored bytes"):
        play.submit("/models/third")
    with pytest.raises(QuotaExceeded, match="stored bytes"):
        quotas.require_room_for_upload(play.database, TENANT)
    # What was accepted is finished.
    play.run_all()
    assert play.job(job_id)["state"] == "succeeded"
    assert used(play, "unfinished_jobs") == 0


def test_schedules_beyond_the_quota_are_refused_until_one_is_removed(play: Play) -> None:
    job = {"source": {"kind": "folder", "path": "/models/tiny"}, "recipes": ["none"]}

    def add(name: str) -> str:
        request = ScheduleRequest.model_validate({"name": name, "job": job, "every_s": 3600})
        return schedules.add_schedule(play.database, TENANT, request, max_variants=1)

    first = add("first")
    add("second")
    quotas.set_quotas(play.database, TENANT, {"schedules": 2})
    with pytest.raises(QuotaExceeded, match="has 2 schedules, and its quota is 2"):
        add("third")
    schedules.remove_schedule(play.database, TENANT, first)
    add("third")
    assert used(play, "schedules") == 2


def test_a_claim_locks_nothing_after_its_tenant(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two due steps another worker takes the first: its tenant is not locked while the second's job is waited for.

    Whoever submits or retries locks a job first, and then the tenant.
    """
    quotas.set_quotas(play.database, TENANT, {"running_steps": 9})
    play.submit("/models/a")
    play.submit("/models/b")
    taken = play.claim("fetch")
    assert taken is not None
    locked = []

    def find(tx: Transaction, *arguments: Any) -> list[str]:
        return [taken.step_id, *find_due_steps(tx, *arguments)]

    def trace(name: str, lock: Any) -> Any:
        def call(tx: Transaction, *arguments: Any) -> Any:
            locked.append(name)
            return lock(tx, *arguments)

        return call

    monkeypatch.setattr(claims, "find_due_steps", find)
    for name in ("lock_linked_jobs", "lock_tenant"):
        monkeypatch.setattr(locks, name, trace(name, getattr(locks, name)))
    claim = play.claim("fetch")
    assert claim is not None
    assert claim.step_id != taken.step_id
    assert locked == ["lock_linked_jobs", "lock_linked_jobs", "lock_tenant"]


def test_a_tenant_that_is_not_there_has_no_quota(play: Play) -> None:
    with pytest.raises(NotFound, match="nobody"):
        quotas.set_quotas(play.database, "nobody", {"unfinished_jobs": 1})
