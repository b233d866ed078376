"""Quotas as tenants and operators meet them: HTTP 429, and a command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.api import schemas
from service.client import Client
from service.errors import QuotaExceeded
from service.ledger import quotas
from tests.api_world import World

Run = Callable[..., Any]


def test_a_refusal_says_number_and_limit(world: World, http: TestClient) -> None:
    assert http.get("/healthz").status_code == 200
    quotas.set_quotas(world.database, "default", {"unfinished_jobs": 1})
    body = {"source": world.source}
    first = http.post("/v1/jobs", json=body, headers={"Idempotency-Key": "mine"})
    assert first.status_code == 201
    refused = http.post("/v1/jobs", json=body, headers={"Idempotency-Key": "other"})
    assert refused.status_code == 429
    problem = schemas.Problem.model_validate(refused.json())
    assert (problem.code, problem.retryable) == ("quota_exceeded", True)
    assert problem.details == {"quota": "unfinished_jobs", "used": 1, "limit": 1}
    # The same submission again is no further job.
    again = http.post("/v1/jobs", json=body, headers={"Idempotency-Key": "mine"})
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    # A refused one has not used its key up.
    quotas.set_quotas(world.database, "default", {"unfinished_jobs": 2})
    assert http.post("/v1/jobs", json=body, headers={"Idempotency-Key": "other"}).status_code == 201


def test_an_upload_beyond_the_quota_is_refused(world: World, url: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("seven b")
    with Client(url) as client:
        quotas.set_quotas(world.database, "default", {"stored_bytes": 7})
        client.upload(text)
        with pytest.raises(QuotaExceeded) as refused:
            client.upload(text)
    assert refused.value.details == {"quota": "stored_bytes", "used": 7, "limit": 7}


def test_the_command_sets_shows_and_lifts_quotas(run: Run, tmp_path: Path) -> None:
    ledger = ["--data-dir", tmp_path]
    run("keys", "create", "ci", "--tenant", "team", *ledger)
    given = ["--running-steps", "8", "--unfinished-jobs", "500", "--stored", "200GB", "--schedules", "20"]
    assert run("tenants", "limit", "team", *given, *ledger).exit_code == 0
    (team,) = json.loads(run("tenants", "--json", *ledger).stdout)
    limits = {name: quota["limit"] for name, quota in team["quotas"].items()}
    assert limits == {"running_steps": 8, "unfinished_jobs": 500, "stored_bytes": 200 * 1000**3, "schedules": 20}
    shown = run("tenants", *ledger).stdout
    assert "0 of 500" in shown
    assert "0 B of 200.0 GB" in shown
    assert run("tenants", "limit", "team", "--stored", "none", *ledger).exit_code == 0
    (team,) = json.loads(run("tenants", "--json", *ledger).stdout)
    assert (team["quotas"]["stored_bytes"]["limit"], team["quotas"]["running_steps"]["limit"]) == (None, 8)


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        (["team"], "invalid_request", 2),
        (["team", "--running-steps", "few"], "invalid_request", 2),
        (["team", "--stored", "1,5GB"], "invalid_request", 2),
        (["nobody", "--running-steps", "1"], "not_found", 1),
    ],
)
def test_the_command_says_what_is_wrong(
    run: Run, tmp_path: Path, arguments: list[str], code: str, exit_code: int
) -> None:
    refused = run("tenants", "limit", *arguments, "--data-dir", tmp_path)
    assert (refused.exit_code, refused.stderr.partition(":")[0]) == (exit_code, code)
