"""Metrics and JSON logs of real processes, after a job of which one step failed."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from service.ledger.counts import read_counts, read_totals
from service.metrics import LedgerCollector
from tests.api_world import World
from tests.kiln import Kiln, clean_environment, fired_up

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Watched:
    """A kiln that has worked, and where its metrics are."""

    kiln: Kiln
    api_port: int
    worker_port: int
    job_id: str


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("metrics")
    checkpoint = folder / "models" / "broken"
    checkpoint.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (checkpoint / name).write_text("{}")
    api_port, worker_port = find_free_port(), find_free_port()
    ports = {"api_metrics_port": api_port, "worker_metrics_port": worker_port}
    with fired_up(folder / "kiln", folder / "models", log_format="json", **ports) as kiln:
        job_id = kiln.submit(checkpoint)
        assert kiln.client.wait(job_id)["state"] == "failed"
        yield Watched(kiln, api_port, worker_port, job_id)


def scrape(port: int) -> Samples:
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def count(samples: Samples, kind: str, outcome: str) -> float:
    return samples.get(("edgekiln_step_seconds_count", frozenset({("kind", kind), ("outcome", outcome)})), 0)


def test_a_worker_counts_its_attempts(watched: Watched) -> None:
    samples = scrape(watched.worker_port)
    assert [count(samples, kind, "succeeded") for kind in ("resolve", "fetch", "plan")] == [1, 1, 0]
    assert [count(samples, kind, "failed") for kind in ("resolve", "fetch", "plan")] == [0, 0, 1]
    assert samples["edgekiln_store_bytes_total", frozenset({("direction", "written")})] > 0


def test_the_ledger_is_counted_at_each_scrape(watched: Watched) -> None:
    samples = scrape(watched.api_port)
    nothing: frozenset[tuple[str, str]] = frozenset()
    assert samples["edgekiln_workers", nothing] == 1
    assert samples["edgekiln_blob_bytes", nothing] > 0
    assert not [name for name, _ in samples if name == "edgekiln_jobs"], "no job is unfinished"


def test_logs_are_json_and_say_which_step(watched: Watched) -> None:
    records = [json.loads(line) for line in watched.kiln.worker_log.splitlines() if line.startswith("{")]
    plan = next(step for step in watched.kiln.client.get(watched.job_id)["steps"] if step["kind"] == "plan")
    mine = [record for record in records if record.get("step") == plan["id"]]
    assert any(record["message"].startswith("failed: ") and record["level"] == "WARNING" for record in mine)
    assert {record["attempt"] for record in mine} == {1}


def test_unfinished_work_is_counted(world: World, http: TestClient) -> None:
    play = world.play()
    first = http.post("/v1/jobs", json={"source": world.source, "recipes": ["none"]}).json()["id"]
    counts = read_counts(world.database)
    assert counts.steps == {("fetch", "queued"): 1}
    assert 0 <= counts.oldest_queued_s["fetch"] < 3600
    assert (counts.jobs, counts.workers, read_totals(world.database).reused) == ({"queued": 1}, 1, 0)
    play.run_all()
    assert http.get(f"/v1/jobs/{first}").json()["state"] == "succeeded"
    http.post("/v1/jobs", json={"source": world.source, "recipes": ["none"]})
    play.run_all()
    counts = read_counts(world.database)
    assert (counts.steps, counts.jobs, counts.oldest_queued_s) == ({}, {}, {})
    totals = read_totals(world.database)
    assert totals.reused > 0
    assert totals.blob_bytes > totals.blobs > 0
    http.post("/v1/jobs", json={"source": world.source})
    text = generate_latest(LedgerCollector(world.database)).decode()
    assert 'edgekiln_steps{resource_class="fetch",state="queued"} 1.0' in text
    assert 'edgekiln_jobs{state="queued"} 1.0' in text


def test_a_worker_whose_port_is_taken_does_not_look_alive(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = {"data_dir": tmp_path / "data", "worker_metrics_port": taken.getsockname()[1]}
        command = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "--pool=threads", "-n", "w@%h"]
        environment = clean_environment(tmp_path, settings)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "invalid_settings: Metrics cannot be served on 127.0.0.1:" in done.stderr
