"""A soak: an installation that works for minutes without a fault, and holds no more of anything in the end.

Watches memory and file descriptors of workers, API and beat, the processes there are, and the keys in Redis. Not part
of `make test`; `make chaos` names this file, and says how long.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest

from service.client import Client
from tests.chaos import scale
from tests.chaos.light_steps import write_model
from tests.chaos.servers import Postgres, Redis, running, s3_server
from tests.chaos.storm import Fleet, fleet
from tests.kiln import find_processes, wait_for
from tests.services import free_port

_SAMPLES = 60
_LIVE_JOBS = 4
#: What the last third may hold beyond the middle one: a share, and an amount of each thing.
_GROWTH = 0.05
_SLACK: Mapping[str, float] = {"rss_mib": 8, "fds": 4, "processes": 4, "redis_keys": 4}


def test_nothing_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port, models = free_port(), tmp_path / "models"
    models.mkdir()
    settings = {"port": port, "source_roots": str(models)}
    with running(Postgres) as postgres, running(Redis) as broker, s3_server() as address:
        with fleet(tmp_path, postgres, broker, address, workers=2, **settings) as made:
            others = {
                "API": made.start("service.api"),
                "beat": made.start("celery", "-A", "tests.chaos.light_app", "beat", "-s", str(tmp_path / "beat")),
            }
            workers = {f"worker {number}": worker for number, worker in enumerate(made.processes)}
            pids = {name: process.pid for name, process in {**others, **workers}.items()}
            with Client(f"http://127.0.0.1:{port}") as client:
                wait_for(lambda: is_ready(client), "the API serves")
                samples, done = soak(made, broker, client, models, pids)
            assert all(worker.is_alive() for worker in workers.values())
            for process in others.values():
                assert process.poll() is None
                process.kill()
                process.wait()
    rows = compare(samples)
    with capsys.disabled():
        print(f"\nsoak of {scale.SOAK_MIN:g} minutes, {done} jobs; medians of the middle and the last third")
        print("\n".join(f"  {name:<24} {middle:>10.1f} {last:>10.1f}" for name, middle, last in rows))
    grown = [
        (name, middle, last)
        for name, middle, last in rows
        if last > middle * (1 + _GROWTH) + _SLACK[name.rpartition(" ")[2]]
    ]
    assert grown == []


def is_ready(client: Client) -> bool:
    try:
        return bool(client.readiness()["ready"])
    except Exception:
        return False


def soak(
    made: Fleet, broker: Redis, client: Client, models: Path, pids: Mapping[str, int]
) -> tuple[dict[str, list[float]], int]:
    """Keep a few jobs going; return the samples by what they are of, and how many jobs have ended."""
    samples: dict[str, list[float]] = defaultdict(list)
    live: list[str] = []
    numbers = itertools.count()
    done = 0
    begun = time.monotonic()
    for index in range(_SAMPLES):
        until = begun + (index + 1) * scale.SOAK_MIN * 60 / _SAMPLES
        while time.monotonic() < until:
            while len(live) < _LIVE_JOBS:
                number = next(numbers)
                folder = write_model(models / str(number), scale.SEED + number, "succeeded")
                source = {"kind": "folder", "path": str(folder)}
                live.append(client.submit({"source": source, "recipes": ["none"], "formats": ["tflite"]})["id"])
            for job_id in list(live):
                job = client.get(job_id)
                if job["is_final"]:
                    assert job["state"] == "succeeded", job
                    live.remove(job_id)
                    done += 1
            time.sleep(0.2)
        take_sample(samples, made, broker, pids)
    return samples, done


def take_sample(samples: dict[str, list[float]], made: Fleet, broker: Redis, pids: Mapping[str, int]) -> None:
    for name, pid in pids.items():
        status = Path(f"/proc/{pid}/status").read_text()
        (rss_kib,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
        samples[f"{name} rss_mib"].append(rss_kib / 1024)
        samples[f"{name} fds"].append(len(list(Path(f"/proc/{pid}/fd").iterdir())))
    samples["all processes"].append(len(find_processes(made.folder)))
    with broker.connect() as connection:
        samples["all redis_keys"].append(float(connection.dbsize()))


def compare(samples: Mapping[str, list[float]]) -> list[tuple[str, float, float]]:
    """Return name, median of the middle third and of the last; the first third is warming up."""
    third = _SAMPLES // 3
    return [
        (name, statistics.median(values[third : 2 * third]), statistics.median(values[2 * third :]))
        for name, values in sorted(samples.items())
    ]
