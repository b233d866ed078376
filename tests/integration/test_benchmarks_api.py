"""Benchmarks of published artifacts as users ask for them: route, SDK, command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.client import Client
from service.commands.jobs import name_source
from service.errors import Conflict, InvalidRequest, NotFound
from service.ledger import claims, devices, results
from tests.api_world import World
from tests.integration.test_cli_server import Run
from tests.ledger_play import BENCHMARK, POLICY, TOOLCHAIN


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


def test_a_new_version_of_a_tool_says_what_it_has_started(client: Client, run: Run, tmp_path: Path) -> None:
    tool = tmp_path / "benchmark_model"
    tool.write_bytes(b"a tool")
    none = {"started": 0, "known": 0, "away": 0, "refused": 0}
    assert client.rebenchmark("benchmark_model", "1", "arm64-v8a", {tool.name: tool}) == none
    said = run("tools", "add", tool.name, tool, "--version", "1", "--abi", "arm64-v8a", "--rebenchmark")
    assert (said.exit_code, "Benchmarks started with it: 0." in said.output) == (0, True), said.output
    tool.write_bytes(b"a newer one")
    (_, newest) = client.add_tool("benchmark_model", "2", "arm64-v8a", {tool.name: tool})
    assert newest["version"] == "2"
    tool.write_bytes(b"a tool")
    with pytest.raises(Conflict, match="Phones get benchmark_model 2"):
        client.rebenchmark("benchmark_model", "1", "arm64-v8a", {tool.name: tool})


def test_what_will_fit_is_said_as_far_as_it_is_known(world: World, client: Client, run: Run) -> None:
    artifact = publish(world, client)
    assert client.fit(artifact["id"])["devices"] == [], "there is no phone"
    play = world.play()
    for serial, kind in (("A", "phone"), ("B", "phone"), ("V", "virtual")):
        record = {"serial": serial, "kind": kind, "model": f"Model {serial}", "memory_bytes": 8_000_000_000}
        assert devices.register_device(world.database, play.worker_id, serial, record, [serial])
    (first, *_) = client.fit(artifact["id"])["devices"]
    assert (first["verdict"], first["basis"], first["predicted"]) == ("unknown", "nothing", {})
    client.benchmark(artifact["id"], ["serial=A"])
    held = claims.claim_for_device(world.database, play.worker_id, "A", POLICY)
    assert held is not None
    figures = {
        "device": {"serial": "A", "kind": "phone"},
        "backend": "cpu",
        "verdict": "stable",
        "format": "litertlm",
        "conditions": {"before": {"memory_available_bytes": 2_000_000_000}},
        "peak_rss_bytes": 1_500_000_000,
        "peak_anon_bytes": 400_000_000,
    }
    document = play.put("measurement.json", b"document")
    results.finish_step(world.database, held, results.Success(figures, [document]), TOOLCHAIN, BENCHMARK)
    found = {each["id"]: each for each in client.fit(artifact["id"])["devices"]}
    assert {name: (each["verdict"], each["basis"]) for name, each in found.items()} == {
        "A": ("fits", "device"),
        "B": ("unknown", "artifact"),
        "V": ("unknown", "nothing"),
    }
    assert found["B"]["predicted"]["peak_rss_bytes"]["estimate"] == 1_500_000_000
    assert "Nobody has seen how much memory" in found["B"]["sentence"]
    assert {each["basis"] for each in client.fit(artifact["id"], backend="gpu")["devices"]} == {"nothing"}
    said = run("fit", artifact["id"], "--device", "serial=A")
    assert (said.exit_code, "fits" in said.stdout, "1.5 GB" in said.stdout) == (0, True, True), said.output
    assert "V" not in said.stdout
    with pytest.raises(InvalidRequest, match="selects no device"):
        client.fit(artifact["id"], "soc")
    with pytest.raises(NotFound):
        client.fit("art_0")
