"""What the service costs above bare parts, in one run: submissions per second, and the time from submission to running.

    python benchmarks/serving.py --json out/serving.json

Submissions: the API (`python -m service.api`, on PostgreSQL and Redis) against `benchmarks/bare_endpoint.py`, which
does one INSERT a request into the same PostgreSQL; both under uvicorn in one process, asked in turn by the same number
of connections. Submit to running: from before the request to the claim of the first step by a real worker, against
the round trip of a Celery task without content with its result, on the same Redis and a worker with the same pool. A
PostgreSQL and a Redis are started for the purpose, unless `EDGEKILN_TEST_POSTGRES_URL` and `EDGEKILN_TEST_REDIS_URL`
name some; the former is told to forgo fsync, which favours the bare endpoint.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from celery import Celery
from sqlalchemy import select, text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from service.ledger import access
from service.ledger.database import Database, migrate
from service.ledger.tables import Attempt, JobStep, Step
from tests.kiln import clean_environment, wait_for
from tests.services import make_database, postgres_url, redis_url

_FOLDER = Path(__file__).resolve().parent
_BODY = {"source": {"kind": "hub", "repo": "owner/name"}, "recipes": ["dynamic_int8"], "formats": ["tflite"]}
_WORKER = ["worker", "--pool=threads", "--concurrency=2", "--loglevel=WARNING", "--without-gossip", "--without-mingle"]


async def _ask(url: str, headers: dict[str, str], until: float, seconds: list[float]) -> None:
    """Send the request again and again over one connection; a client in Python must cost as little as it can."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(_BODY).encode()
    lines = ["POST /v1/jobs HTTP/1.1", f"Host: {host}:{port}", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in headers.items()] + [f"Content-Length: {len(body)}", "", ""]
    message = "\r\n".join(lines).encode() + body
    reader, writer = await asyncio.open_connection(host, int(port))
    while (started := time.perf_counter()) < until:
        writer.write(message)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 201"), head
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.split(b":")[1]))
        seconds.append(time.perf_counter() - started)
    writer.close()


def count_per_second(url: str, connections: int, duration_s: float, headers: dict[str, str]) -> float:
    """Return how many submissions a server takes a second."""

    async def run() -> float:
        seconds: list[float] = []
        started = time.perf_counter()
        await asyncio.gather(*(_ask(url, headers, started + duration_s, seconds) for _ in range(connections)))
        return len(seconds) / (time.perf_counter() - started)

    return asyncio.run(run())


@contextmanager
def process(command: list[str], environment: dict[str, str], folder: Path, **options: Any) -> Iterator[None]:
    """Run a program meanwhile."""
    with (folder / "log").open("ab") as log:
        child = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, **options)
    try:
        yield
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait()


@contextmanager
def served(command: list[str], environment: dict[str, str], folder: Path) -> Iterator[str]:
    """Run a server on a socket of its own; yield its URL when it answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with process([*command, "--fd", str(listener.fileno())], environment, folder, pass_fds=(listener.fileno(),)):
        httpx.get(f"{url}/openapi.json", timeout=60).raise_for_status()
        yield url
    listener.close()


def measure_submissions(
    servers: dict[str, tuple[str, dict[str, str]]], rounds: int, connections: int, duration_s: float
) -> dict[str, Any]:
    """Ask the servers in turn; return submissions per second and the median of the rounds' ratios to the first."""
    for url, headers in servers.values():
        count_per_second(url, connections, 1.0, headers)  # prepares statements and fills pools
    found: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(rounds):
        for name, (url, headers) in servers.items():
            found[name].append(count_per_second(url, connections, duration_s, headers))
    first = next(iter(servers))
    return {
        name: {
            "per_s": statistics.median(values),
            "ratio": statistics.median(value / bare for value, bare in zip(values, found[first], strict=True)),
        }
        for name, values in found.items()
    }


def measure_latency(url: str, database: Database, celery: Celery, rounds: int) -> dict[str, Any]:
    """Submit a job and call a task in turn, one at a time; return medians in seconds."""
    running: list[float] = []
    trips: list[float] = []
    with httpx.Client(base_url=url) as http:
        for number in range(rounds + 5):
            begun = time.time()
            job_id = http.post("/v1/jobs", json=_BODY).raise_for_status().json()["id"]
            started_at = wait_for(lambda job_id=job_id: _read_start(database, job_id), "the step runs", 60)
            wait_for(lambda job_id=job_id: _has_ended(database, job_id), "the step has ended", 60)
            asked = time.perf_counter()
            celery.send_task("bare.nothing", queue="bare").get(timeout=60)
            if number >= 5:
                trips.append(time.perf_counter() - asked)
                running.append(started_at - begun)
    medians = {"submit_to_running_s": statistics.median(running), "round_trip_s": statistics.median(trips)}
    return {**medians, "ratio": medians["submit_to_running_s"] / medians["round_trip_s"]}


def _read_start(database: Database, job_id: str) -> float | None:
    """When the job's first step was claimed, by the clock that the database and this program share."""
    statement = (
        select(Attempt.started_at).join(JobStep, JobStep.step_id == Attempt.step_id).where(JobStep.job_id == job_id)
    )
    started_at = database.read(lambda connection: connection.execute(statement).scalar())
    return None if started_at is None else float(started_at.timestamp())


def _has_ended(database: Database, job_id: str) -> bool:
    statement = (
        select(Step.id)
        .join(JobStep, JobStep.step_id == Step.id)
        .where(JobStep.job_id == job_id, Step.finalized_at.is_not(None))
    )
    return database.read(lambda connection: connection.execute(statement).first()) is not None


def main() -> None:
    """Start, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of submissions")
    parser.add_argument("--duration-s", type=float, default=4.0, help="of each")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--trips", type=int, default=100, help="jobs that are followed until they run; 0: none")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    given = parser.parse_args()
    figures: dict[str, Any] = {"load_before": os.getloadavg()[0]}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serving-")))
        server_url, broker_url = stack.enter_context(postgres_url()), stack.enter_context(redis_url())
        ledger_url = make_database(server_url, f"edgekiln_serving_{secrets.token_hex(4)}")
        migrate(ledger_url)
        database = Database(ledger_url)
        stack.callback(database.close)
        access.ensure_tenant(database, access.DEFAULT_TENANT)
        key = access.create_key(database, access.DEFAULT_TENANT, "benchmark").secret
        # Nothing listens there: the first step ends soon after it has begun.
        hub = {"hub_endpoint": "http://127.0.0.1:9", "max_failures": 1, "light_slots": 1, "device_slots": 0}
        unlimited = {"key_requests_per_min": 0, "tenant_requests_per_min": 0}
        settings = {"database_url": ledger_url, "broker_url": broker_url, "data_dir": folder / "data"} | hub | unlimited
        environment = {
            **clean_environment(folder, settings),
            "BARE_DATABASE_URL": make_database(server_url, f"edgekiln_serving_{secrets.token_hex(4)}"),
        }
        environment["BARE_BROKER_URL"] = broker_url
        bare = stack.enter_context(served([sys.executable, str(_FOLDER / "bare_endpoint.py")], environment, folder))
        api = stack.enter_context(served([sys.executable, "-m", "service.api"], environment, folder))
        servers = {
            "bare endpoint": (bare, {}),
            "EdgeKiln": (api, {}),
            "EdgeKiln, with a key": (api, {"Authorization": f"Bearer {key}"}),
        }
        figures["submissions"] = measure_submissions(servers, given.rounds, given.connections, given.duration_s)
        if given.trips:
            with database.engine.begin() as connection:
                connection.execute(text("UPDATE steps SET state = 'cancelled', finalized_at = clock_timestamp()"))
            environment["PYTHONPATH"] += f":{_FOLDER}"
            for name, queue in (("workers.app", "fetch"), ("bare_task", "bare")):
                command = [sys.executable, "-m", "celery", "-A", name, *_WORKER, "-Q", queue, "-n", f"{queue}@%h"]
                stack.enter_context(process(command, environment, folder))
            celery = Celery(broker=broker_url, backend=broker_url)
            figures["latency"] = measure_latency(api, database, celery, given.trips)
    figures["load_after"] = os.getloadavg()[0]
    print("| | submissions/s | ratio |\n| --- | ---: | ---: |")
    for name, row in figures["submissions"].items():
        print(f"| {name} | {row['per_s']:.0f} | {row['ratio']:.2f} |")
    if given.trips:
        row = figures["latency"]
        print(f"\nsubmit to running {row['submit_to_running_s'] * 1000:.1f} ms, ", end="")
        print(f"bare round trip {row['round_trip_s'] * 1000:.1f} ms, ratio {row['ratio']:.2f}")
    print(f"load {figures['load_before']:.1f} before, {figures['load_after']:.1f} after")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
