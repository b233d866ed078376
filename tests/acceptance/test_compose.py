"""docker-compose.yml without Docker: its commands and environments, started as they stand, on real servers.

What is changed is where things are: addresses and folders of containers become those of this machine. PostgreSQL and
the S3 server are the tests' own, Redis is started by the file's own command.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, select, text

from service.client import Client
from service.errors import Unauthorized
from service.ledger.database import Database
from service.ledger.tables import Attempt, Step, Worker
from service.storage import digest_file
from tests import compose
from tests.checkpoints import write_checkpoint
from tests.kiln import ROOT, find_processes, kill_all, wait_for
from tests.services import free_port, make_bucket, postgres_url, s3_server

#: An address that only this machine has, but no name of it that needs no key.
_ANY_ADDRESS = "127.1"
_IMAGE_VARIABLES = dict(re.findall(r"(EDGEKILN_\w+)=(\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8")))


class Deployment:
    """The file's services as processes of this machine, all of whose data are below `folder`."""

    def __init__(self, folder: Path, sources: Path, places: dict[str, str], variables: dict[str, str]) -> None:
        self.folder = folder
        self.document = compose.read_compose(variables)
        self.sources = sources
        self.places = places
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports: dict[tuple[str, str], int] = {}

    def environment(self, name: str, replica: int = 1) -> dict[str, str]:
        """Return what a container of a service has in its environment, in places of this machine."""
        service = self.document["services"][name]
        own = _IMAGE_VARIABLES | {variable: str(value) for variable, value in service["environment"].items()}
        temporary = self.folder / f"{name}-{replica}"
        temporary.mkdir(exist_ok=True)
        self._volume(name, replica).mkdir(exist_ok=True)
        system = {
            # `python` and `edgekiln`, as in the image.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(temporary),
            "TMPDIR": f"{temporary}/",
            "PYTHONPATH": str(ROOT),
        }
        return system | {variable: self._place(value, name, replica) for variable, value in own.items()}

    def command(self, name: str, replica: int = 1) -> list[str]:
        """Return the command of a service."""
        return [self._place(word, name, replica) for word in self.document["services"][name]["command"]]

    def _place(self, value: str, name: str, replica: int) -> str:
        instance = f"{name}-{replica}"
        places = self.places | {
            "/tmp/edgekiln-worker": f"{self.folder}/{instance}/worker",
            "/sources": str(self.sources),
            "/data": str(self._volume(name, replica)),
            "0.0.0.0": _ANY_ADDRESS,
            "8711": str(self._port(instance, "serves")),
            "9464": str(self._port(instance, "metrics")),
        }
        # In one pass: what was put in is not looked at again.
        return re.sub("|".join(map(re.escape, places)), lambda match: places[match[0]], value)

    def url(self, instance: str, what: str = "serves") -> str:
        """Return where an instance serves, or tells its metrics."""
        return f"http://127.0.0.1:{self._port(instance, what)}"

    def _port(self, instance: str, what: str) -> int:
        return self._ports.setdefault((instance, what), free_port())

    def _volume(self, name: str, replica: int) -> Path:
        """Return what stands at /data: a named volume, or the container's own folder."""
        volumes = self.document["services"][name].get("volumes", [])
        named = next((volume.partition(":")[0] for volume in volumes if volume.endswith(":/data")), None)
        return self.folder / (f"volume-{named}" if named else f"{name}-{replica}")

    def run(self, name: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command beside a service, as `docker compose exec` does, or its own command."""
        return subprocess.run(
            list(command) or self.command(name),
            env=self.environment(name),
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )

    def start(self, name: str, replica: int = 1, extra: tuple[str, ...] = ()) -> None:
        """Start one replica of a service."""
        instance = f"{name}-{replica}"
        with (self.folder / f"{instance}.log").open("wb") as log:
            self.processes[instance] = subprocess.Popen(
                [*self.command(name, replica), *extra],
                env=self.environment(name, replica),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def log(self, instance: str) -> str:
        """Return what an instance has written."""
        return (self.folder / f"{instance}.log").read_text(errors="replace")

    def wait_until_healthy(self, name: str) -> None:
        """Ask a service's own health check until it is content."""
        test = self.document["services"][name]["healthcheck"]["test"]
        assert test[0] == "CMD"

        def is_healthy() -> bool:
            process = self.processes[f"{name}-1"]
            assert process.poll() is None, self.log(f"{name}-1")
            return self.run(name, *test[1:]).returncode == 0

        wait_for(is_healthy, f"{name} is healthy")

    def close(self) -> None:
        """Leave nothing behind."""
        kill_all(self.folder)
        for process in self.processes.values():
            # Redis writes its title over its environment, by which the others are found.
            process.kill()
            process.wait()


@contextmanager
def postgres() -> Iterator[str]:
    """Yield host and port of a PostgreSQL of our own: roles belong to a whole server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("EDGEKILN_TEST_POSTGRES_URL", raising=False)
        with postgres_url() as url:
            engine = create_engine(url, isolation_level="AUTOCOMMIT")
            with engine.connect() as connection:
                connection.execute(text("CREATE ROLE edgekiln LOGIN"))
                connection.execute(text("CREATE DATABASE edgekiln OWNER edgekiln"))
            yield f"{engine.url.host}:{engine.url.port}"
            engine.dispose()


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    """Everything that the file starts, but for the proxy."""
    folder = tmp_path / "deployment"
    folder.mkdir()
    write_checkpoint(tmp_path / "sources" / "tiny", config={"num_hidden_layers": 1, "max_position_embeddings": 64})
    with ExitStack() as stack:
        database = stack.enter_context(postgres())
        address = stack.enter_context(s3_server(tmp_path / "s3"))
        # The file's own server makes it at its first start.
        make_bucket(address, "edgekiln")
        redis_port = free_port()
        variables = {
            "HOST_NAME": "here",
            "POSTGRES_PASSWORD": "0a1b2c",
            "REDIS_PASSWORD": "3d4e5f",
            "S3_ACCESS_KEY_ID": address["access_key_id"],
            "S3_SECRET_ACCESS_KEY": address["secret_access_key"],
            "S3_REGION": address["region"],
            "GARAGE_RPC_SECRET": "unused",
        }
        places = {
            "postgres:5432": database,
            "redis:6379": f"127.0.0.1:{redis_port}",
            "http://store:3900": address["endpoint_url"],
        }
        deployment = Deployment(folder, tmp_path / "sources", places, variables)
        stack.callback(deployment.close)
        local = ("--bind", "127.0.0.1", "--port", str(redis_port), "--dir", f"{folder}/volume-broker")
        deployment.start("redis", extra=local)
        yield deployment
    assert find_processes(folder) == {}


def start_all(deployment: Deployment) -> None:
    """Start the file's own services in the order that it demands: two replicas of the API, one worker a class."""
    migration = deployment.run("migrate")
    assert migration.returncode == 0, migration.stderr
    services = [name for name in compose.own_services(deployment.document) if name != "migrate"]
    for replica in (1, 2):
        deployment.start("api", replica)
    for name in services:
        if name != "api":
            deployment.start(name)
    for name in services:
        deployment.wait_until_healthy(name)


def read_workers(database: Database) -> dict[str, tuple[dict[str, Any], str]]:
    """Return step kind -> slots and host of the worker that did it."""
    statement = (
        select(Step.kind, Worker.slots, Worker.host_id)
        .join(Attempt, Attempt.step_id == Step.id)
        .join(Worker, Worker.id == Attempt.worker_id)
    )
    return {kind: (slots, host) for kind, slots, host in database.read(lambda tx: tx.execute(statement).all())}


def test_the_file_s_commands_convert_a_checkpoint(deployment: Deployment, tmp_path: Path) -> None:
    start_all(deployment)
    made = deployment.run("api", "edgekiln", "keys", "create", "test", "--json")
    assert made.returncode == 0, made.stderr
    key = json.loads(made.stdout)["key"]
    urls = [deployment.url(name) for name in ("api-1", "api-2")]

    with Client(urls[0]) as stranger, pytest.raises(Unauthorized):
        stranger.get("job_0")
    with Client(urls[0], key) as first, Client(urls[1], key) as second:
        assert second.readiness()["ready"]
        source = {"kind": "folder", "path": str(deployment.sources / "tiny")}
        job_id = first.submit(source=source, recipes=["none"], formats=["tflite"], devices=["host"])["id"]

        def find_end() -> dict[str, Any] | None:
            job = second.get(job_id)
            return job if job["is_final"] else None

        job = wait_for(find_end, "the job has ended")
        assert job["state"] == "succeeded", job
        files = second.download(job_id, tmp_path / "out")
        (artifact,) = first.artifacts(job_id)
    assert digest_file(next(path for path in files if path.suffix == ".tflite"))[0] == artifact["sha256"]

    # Every step was done by the worker of its class.
    database = Database(deployment.environment("api")["EDGEKILN_DATABASE_URL"])
    workers = read_workers(database)
    classes = dict(database.read(lambda tx: tx.execute(select(Step.kind, Step.resource_class)).all()))
    database.close()
    assert {kind: {name for name, count in slots.items() if count} for kind, (slots, _) in workers.items()} == {
        kind: {resource_class} for kind, resource_class in classes.items()
    }
    assert set(classes.values()) == {"fetch", "convert", "light", "device"}
    assert {host for _, host in workers.values()} == {"here"}

    # What is watched is where the file says.
    for instance, figure in (("api-1", "edgekiln_workers"), ("worker-light-1", "edgekiln_step_seconds")):
        assert figure in httpx.get(f"{deployment.url(instance, 'metrics')}/metrics", trust_env=False).text

    # Control: a health check is not content with anything.
    deployment.processes["api-1"].kill()
    deployment.processes["api-1"].wait()
    check = deployment.run("api", "edgekiln", "health", "api", "--json")
    assert (check.returncode, json.loads(check.stdout)["code"]) == (1, "service_unavailable")
