"""A real deployment whose steps are light: the API and workers as processes, by the commands that operators use.

For what only several processes can show. Owns them and ends them; the steps are `tests.chaos.light_steps`, everything
else is real. Called by `tests/integration`.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import select

from service.client import Client
from service.ledger.database import Database, migrate
from service.ledger.tables import Attempt, Host, Step, Worker
from service.settings import load_settings
from tests.chaos.light_steps import MODEL_FILE
from tests.kiln import IMPATIENT, clean_environment, find_processes, kill_all, wait_for

#: A lease that nobody outwaits: whatever happens in time is not due to its end.
LONG_LEASE = {"lease_s": 1200, "heartbeat_s": 600}


class LightFleet:
    """One data directory below `folder`."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None, **settings: Any) -> None:
        self.folder = folder
        self.models = folder / "models"
        self.models.mkdir(parents=True)
        self.settings = {**IMPATIENT, **settings, "data_dir": folder / "data", "source_roots": self.models}
        self.environment = {**clean_environment(folder, self.settings), **(environment or {})}
        self.processes: list[subprocess.Popen[bytes]] = []
        ledger_url = load_settings({"data_dir": folder / "data"}).ledger_url
        migrate(ledger_url)
        self.database = Database(ledger_url)
        self.client = self._start_api()

    def _start_api(self) -> Client:
        listener = socket.create_server(("127.0.0.1", 0))
        self._start(["service.api", "--fd", str(listener.fileno())], self.environment, pass_fds=(listener.fileno(),))
        client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}")
        listener.close()
        return client

    def start_worker(self, host: str, tools: str = "", **settings: Any) -> subprocess.Popen[bytes]:
        """Start a worker as if on a machine of that name; return when it is registered."""
        names = {"host_name": host, **settings}
        environment = {**self.environment, **{f"EDGEKILN_{name.upper()}": str(value) for name, value in names.items()}}
        environment["LIGHT_TOOLS"] = tools
        queues = "fetch,convert,light,device"
        command = ["celery", "-A", "tests.chaos.light_app", "worker", "--pool=threads", "--concurrency=8", "-Q", queues]
        before = self.worker_ids(host)
        name = f"{host}-{len(self.processes)}@%h"
        process = self._start([*command, "-n", name, "--without-gossip", "--without-mingle"], environment)
        wait_for(
            lambda: process.poll() is None and self.worker_ids(host) != before, f"a worker of {host} is registered"
        )
        return process

    def _start(self, words: list[str], environment: dict[str, str], **options: Any) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", *words],
                env=environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                **options,
            )
        self.processes.append(process)
        return process

    def write_model(self, name: str, **more: Any) -> dict[str, Any]:
        """Write a checkpoint that succeeds; `hold`: the kind of step that does not end. Returns the source."""
        folder = self.models / name
        folder.mkdir()
        (folder / MODEL_FILE).write_text(json.dumps({"seed": name, "fate": "succeeded", **more}))
        return {"kind": "folder", "path": str(folder)}

    def submit(self, source: dict[str, Any]) -> str:
        """Submit a job of eight steps."""
        return str(self.client.submit(source=source, recipes=["none"], formats=["tflite"])["id"])

    def wait_running(self, job_id: str, kind: str) -> dict[str, Any]:
        """Wait until the child of a job's step is at work; return the step."""

        def find() -> dict[str, Any] | None:
            steps = self.client.get(job_id)["steps"]
            return next((each for each in steps if each["kind"] == kind and each["progress"]), None)

        return wait_for(find, f"{kind} of {job_id} is at work")

    def worker_ids(self, host: str) -> list[str]:
        """Ids of a host's workers that have not ended, the oldest first."""
        statement = (
            select(Worker.id)
            .join(Host, Host.id == Worker.host_id)
            .where(Host.id == host, Worker.ended_at.is_(None))
            .order_by(Worker.started_at)
        )
        return self.database.read(lambda connection: list(connection.execute(statement).scalars()))

    def attempts(self, step_id: str) -> list[tuple[str, str]]:
        """Host and state of each attempt at a step, the oldest first."""
        statement = (
            select(Worker.host_id, Attempt.state)
            .join(Worker, Worker.id == Attempt.worker_id)
            .where(Attempt.step_id == step_id)
            .order_by(Attempt.token)
        )
        return self.database.read(
            lambda connection: [(host, str(state)) for host, state in connection.execute(statement)]
        )

    def hosts_of(self, job_id: str) -> set[str]:
        """The hosts that attempted steps of a job."""
        return {host for step in self.client.get(job_id)["steps"] for host, _ in self.attempts(step["id"])}

    def read_step(self, step_id: str) -> Any:
        """Return a step's row."""
        return self.database.read(lambda connection: connection.execute(select(Step).where(Step.id == step_id)).one())

    def step_pids(self) -> list[int]:
        """The processes of running children: each has a supervisor."""
        return [pid for pid in find_processes(self.folder) if _read_name(pid) == "ek-supervisor"]

    @property
    def log(self) -> str:
        """What all processes have written."""
        return (self.folder / "log").read_text(errors="replace")

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """End a process as an operator does, and wait for its end."""
        process.send_signal(signal.SIGTERM)
        process.wait(60)

    def close(self) -> None:
        """Leave nothing behind."""
        self.client.close()
        kill_all(self.folder)
        for process in self.processes:
            process.wait()
        self.database.close()


def _read_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


@contextmanager
def light_fleet(folder: Path, **options: Any) -> Iterator[LightFleet]:
    """Yield a deployment without workers; leave nothing of it."""
    fleet = LightFleet(folder, **options)
    try:
        yield fleet
    finally:
        fleet.close()
