"""Benchmarks of published artifacts as users ask for them: route, SDK, command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from service.client import Client
from service.commands.jobs import name_source
from service.errors import InvalidRequest, NotFound
from tests.api_world import World
from tests.integration.test_cli_server import Run


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as sdk:
        yield sdk


def publish(world: World, client: Client) -> Any:
    job = client.submit(source=world.source, recipes=["none"], formats=["litertlm"])
    world.play().run_all()
    (artifact,) = client.artifacts(job["id"])
    return artifact


def test_an_artifact_is_measured_by_a_job_of_its_own(world: World, client: Client) -> None:
    artifact = publish(world, client)
    job = client.benchmark(artifact["id"], ["host"], idempotency_key="once", priority=3)
    assert client.benchmark(artifact["id"], ["host"], idempotency_key="once", priority=3)["id"] == job["id"]
    assert (job["state"], job["priority"], job["request"]["artifact"]) == ("queued", 3, artifact["id"])
    assert world.pokes[-1] == ["device"], "the host's worker is woken"
    assert world.play().run_all() == ["benchmark"]
    done = client.wait(job["id"])
    assert (done["state"], done["variants"][0]["artifacts"]) == ("succeeded", [])
    assert [one["state"] for one in client.list()] == ["succeeded", "succeeded"]
    assert client.artifacts(job["id"]) == []
    with pytest.raises(NotFound):
        client.benchmark("art_0", ["host"])


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"devices": []}, "at least 1 item"),
        ({"devices": ["soc"]}, "selects no device"),
        ({"devices": ["any"], "backends": ["tpu"]}, "'cpu', 'gpu' or 'npu'"),
        ({"devices": ["any"], "threads": [0]}, "greater than or equal to 1"),
        ({"devices": ["any"], "gates": {}}, "Extra inputs"),
    ],
)
def test_what_cannot_be_measured_is_refused(world: World, asked: dict[str, Any], sentence: str) -> None:
    with world.http() as http:
        answer = http.post("/v1/artifacts/art_0/benchmarks", json=asked)
    assert (answer.status_code, answer.json()["code"]) == (422, InvalidRequest.code)
    assert sentence in answer.json()["detail"]


def test_nobody_submits_a_job_that_only_the_ledger_makes(world: World) -> None:
    with world.http() as http:
        answer = http.post("/v1/jobs", json={"source": world.source, "artifact": "art_0", "processes": 1})
    assert answer.status_code == 422


def test_the_command_prints_the_job(world: World, run: Run) -> None:
    submitted = run("submit", world.source["path"], "--recipe", "none").stdout.strip()
    world.play().run_all()
    shown = run("job", submitted).stdout
    (artifact,) = json.loads(run("job", submitted, "--json").stdout)["variants"][0]["artifacts"]
    assert artifact["id"] in shown
    result = run("benchmark", artifact["id"], "--device", "host")
    assert result.exit_code == 0, result.output
    (job, _) = json.loads(run("jobs", "--json").stdout)
    assert name_source(job["request"]) == f"{artifact['id']} of {world.source['path']}"
    world.play().run_all()
    table = run("job", result.stdout.strip())
    assert "1,234" in table.stdout, "what the host measured"
    assert "4 of 5 steps were reused" in table.output
    wrong = run("benchmark", artifact["id"], "--device", "hots")
    assert (wrong.exit_code, "host" in wrong.output) == (2, True)
