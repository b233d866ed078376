"""The fleet through REST and the command line: for operators, and for nobody else."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from service.api import schemas
from service.client import Client
from service.errors import OperatorRequired
from service.ledger import access
from tests.api_world import StoredPlay, World

Run = Callable[..., Any]


@pytest.fixture
def play(world: World) -> StoredPlay:
    """A worker that holds a step of another tenant's."""
    play = world.play("secretive")
    play.submit("/models/unheard-of")
    assert play.claim("fetch")
    return play


def make_key(world: World, tenant: str, *, is_operator: bool) -> str:
    access.ensure_tenant(world.database, tenant)
    scopes = access.Scope if is_operator else access.DEFAULT_SCOPES
    return access.create_key(world.database, tenant, "mine", scopes=scopes).secret


def test_the_document_is_as_the_schema_says(world: World, play: StoredPlay) -> None:
    with world.http() as http:
        answer = http.get("/v1/workers")
        assert answer.status_code == 200
        (worker,) = schemas.WorkerList.model_validate(answer.json()).workers
        assert [step.tenant for step in worker.running] == ["secretive"]
        drained = http.post(f"/v1/workers/{play.worker_id}/drain")
        assert schemas.WorkerDocument.model_validate(drained.json()).state == "draining"
        assert http.post("/v1/workers/worker_0/drain").status_code == 404


def test_a_tenants_key_sees_nothing_of_the_fleet(world: World, play: StoredPlay, url: str) -> None:
    with Client(url, make_key(world, "nosy", is_operator=False)) as client:
        for ask in (
            client.workers,
            lambda: client.drain_worker(play.worker_id),
            lambda: client.resume_worker(play.worker_id),
            lambda: client.drain_worker("worker_0"),
        ):
            with pytest.raises(OperatorRequired) as refused:
                ask()
            assert "secretive" not in str(refused.value.to_json())
        assert "secretive" not in json.dumps(client.readiness())
        assert "unheard-of" not in json.dumps(client.readiness())


def test_an_operators_key_sees_the_fleet_and_no_other_tenants_jobs(world: World, play: StoredPlay, url: str) -> None:
    with Client(url, make_key(world, "operations", is_operator=True)) as client:
        (worker,) = client.workers()
        assert [step["tenant"] for step in worker["running"]] == ["secretive"]
        assert client.drain_worker(play.worker_id)["state"] == "draining"
        assert client.resume_worker(play.worker_id)["state"] == "live"
        assert list(client.list()) == []


def test_the_command_shows_drains_and_resumes(play: StoredPlay, run: Run) -> None:
    shown = run("workers")
    assert shown.exit_code == 0
    for text in (play.worker_id, "host-a", "live", "fetch 1/2", "resolve of secretive"):
        assert text in shown.stdout
    drained = run("workers", "drain", play.worker_id)
    assert drained.exit_code == 0
    assert "it runs 1 step." in drained.stderr
    (worker,) = json.loads(run("workers", "--json").stdout)
    assert worker["state"] == "draining"
    assert run("workers", "resume", play.worker_id).exit_code == 0
    assert json.loads(run("workers", "--json").stdout)[0]["state"] == "live"
    missing = run("workers", "drain", "worker_0")
    assert (missing.exit_code, missing.stderr.partition(":")[0]) == (1, "not_found")


def test_the_command_waits_until_a_drained_worker_is_idle(
    world: World, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    play = world.play()
    play.submit()
    held = play.claim("fetch")
    assert held
    looks = []

    def finish_meanwhile(pause_s: float) -> None:
        looks.append(pause_s)
        play.finish(held)

    monkeypatch.setattr("service.commands.workers.time", SimpleNamespace(sleep=finish_meanwhile))
    waited = run("workers", "drain", play.worker_id, "--wait")
    assert waited.exit_code == 0
    assert len(looks) == 1
    assert "runs nothing; it can be stopped" in waited.stderr
