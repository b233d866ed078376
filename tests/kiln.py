"""A real `edgekiln up` for tests: started, watched, killed, and never left behind.

Owns the server's process and everything that process started: all of it carries the kiln's folder in its environment,
and is found by that and by nothing else. Called by `tests/chaos` and `tests/acceptance`.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase

from service.client import Client
from service.ledger.database import Database
from service.ledger.tables import Attempt, JobStep, Publication, Step
from service.settings import load_settings
from service.storage import manifest_key

T = TypeVar("T")
Document = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
#: Recovery in seconds instead of minutes; every one of these is an operator's setting.
IMPATIENT = {
    "lease_s": 4,
    "heartbeat_s": 0.5,
    "sweep_s": 0.3,
    "cancel_poll_s": 0.2,
    "retry_pause_s": 0.1,
    "benchmark_processes": 1,
}
#: A test fails after this; none passes because of it.
PATIENCE_S = 180.0
_POLL_S = 0.03


def wait_for(probe: Callable[[], T | None], what: str, patience_s: float = PATIENCE_S) -> T:
    """Return the first result of `probe` that is neither None nor False; fail when there is none in time."""
    give_up_at = time.monotonic() + patience_s
    while True:
        result = probe()
        if result is not None and result is not False:
            return result
        assert time.monotonic() < give_up_at, f"not within {patience_s:g} s: {what}"
        time.sleep(_POLL_S)


def find_processes(folder: Path) -> dict[int, str]:
    """Return pid -> command line of every living process whose environment names `folder`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if os.fsencode(f"{folder}/") in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:  # it ended, or it is another user's
            continue
    return found


def find_children(pid: int) -> list[int]:
    """Return the pids that `pid` started and that live."""
    try:
        return [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
            if is_alive(int(child))
        ]
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def kill_all(folder: Path) -> None:
    """Kill what `folder`'s kilns started, until nothing is left."""

    def none_left() -> bool:
        pids = find_processes(folder)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return not pids

    wait_for(none_left, f"every process of {folder} is dead")


def clean_environment(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment of a process of `folder`: no setting but the given ones, a TMPDIR of its own."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EDGEKILN_")}
    return {
        **inherited,
        **{f"EDGEKILN_{name.upper()}": str(value) for name, value in settings.items()},
        "PYTHONPATH": str(ROOT),
        "TMPDIR": f"{folder}/tmp/",
    }


class Kiln:
    """One data directory below `folder`, and the server on it."""

    def __init__(self, folder: Path, source_root: Path, **settings: Any) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.settings = {**IMPATIENT, **settings, "data_dir": self.data_dir}
        self.environment = clean_environment(folder, self.settings)
        #: How the command is called.
        self.program = [sys.executable, "-m", "service.cli"]
        self._arguments = ["up", "--port", "0", "--source-root", str(source_root)]
        self._output = folder / "up.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._others: list[subprocess.Popen[bytes]] = []
        self._client: Client | None = None
        self._database: Database | None = None

    # --- its life --------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the server and return when it takes jobs."""
        start = self._output.stat().st_size if self._output.exists() else 0
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                [*self.program, *self._arguments], env=self.environment, cwd=self.folder, stdout=output, stderr=output
            )

        def read_url() -> str | None:
            said = self._output.read_text(errors="replace")[start:]
            assert self._process is not None
            assert self._process.poll() is None, f"`up` has ended:\n{said}"
            return next((line.split()[-1] for line in said.splitlines() if line.startswith("EdgeKiln serves")), None)

        self._client = Client(wait_for(read_url, "`up` says where it serves"))

    def kill(self) -> None:
        """Kill the server with SIGKILL, and wait until nothing of it lives."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None
        self._let_go()

    def stop(self) -> None:
        """End the server as Ctrl-C does; it must end well and leave nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        assert self._process.wait(PATIENCE_S) == 0, self.output
        self._process = None
        self._let_go()
        assert find_processes(self.folder) == {}

    def close(self) -> None:
        """Leave nothing behind, whatever has happened."""
        kill_all(self.folder)
        for process in [*self._others, self._process]:
            if process is not None:
                process.wait()
        self._process = None
        self._let_go()

    def also_wait_for(self, process: subprocess.Popen[bytes]) -> None:
        """Count a further process, started with `environment`, as the kiln's."""
        self._others.append(process)

    def _let_go(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._database is not None:
            self._database.close()
            self._database = None

    # --- what it says ----------------------------------------------------------------------------

    @property
    def client(self) -> Client:
        """The SDK, connected."""
        assert self._client is not None, "the server does not run"
        return self._client

    @property
    def output(self) -> str:
        """All that `up` has printed."""
        return self._output.read_text(errors="replace")

    @property
    def worker_log(self) -> str:
        """What the supervised worker has written."""
        return (self.data_dir / "logs" / "worker.log").read_text(errors="replace")

    def submit(self, source: Path, **fields: Any) -> str:
        """Submit a job for a folder; return its id."""
        return str(self.client.submit({"source": {"kind": "folder", "path": str(source)}, **fields})["id"])

    def finished(self, job_id: str) -> Document:
        """Wait until a job has ended; return it."""

        def find() -> Document | None:
            job = self.client.get(job_id)
            return job if job["is_final"] else None

        return wait_for(find, f"{job_id} has ended", PATIENCE_S)

    def step(self, job_id: str, kind: str) -> Document | None:
        """Return a job's first step of `kind` that is not reused."""
        steps = self.client.get(job_id)["steps"]
        return next((step for step in steps if step["kind"] == kind and not step["reused"]), None)

    def running(self, job_id: str, kind: str) -> Document:
        """Wait until the child of a job's step of `kind` is at work; return the step."""

        def find() -> Document | None:
            step = self.step(job_id, kind)
            assert step is None or step["state"] in ("waiting", "queued", "running"), step
            return step if step and step["state"] == "running" and step["progress"] else None

        return wait_for(find, f"{kind} of {job_id} is at work")

    # --- its processes ---------------------------------------------------------------------------

    @property
    def worker_pid(self) -> int | None:
        """The supervised Celery worker."""
        assert self._process is not None
        commands = find_processes(self.folder)
        return next((pid for pid in find_children(self._process.pid) if " worker " in commands.get(pid, "")), None)

    def step_pids(self) -> list[int]:
        """Return the processes that step functions run in now."""
        found = []
        for pid, command in find_processes(self.folder).items():
            try:
                name = Path(f"/proc/{pid}/comm").read_text().strip()
            except OSError:
                continue
            if "workers.sandbox.zygote" in command and name == "ek-supervisor":
                found += find_children(pid)
        return found

    def step_files(self, step: Document, name: str) -> list[Path]:
        """Return the files of this name in a running step's folder."""
        return list((self.data_dir / "work").glob(f"*/{step['id']}-*/{name}"))

    # --- its ledger and store --------------------------------------------------------------------

    @property
    def database(self) -> Database:
        """The server's ledger, to look at."""
        if self._database is None:
            self._database = Database(load_settings(self.settings).ledger_url)
        return self._database

    def rows(self, table: type[DeclarativeBase], **columns: Any) -> list[Document]:
        """Return rows of a table where columns have these values."""
        conditions = [getattr(table, name) == value for name, value in columns.items()]
        return read_rows(self.database, table, *conditions)

    def attempts(self, job_id: str) -> dict[str, list[str]]:
        """Return step kind -> states of all attempts at the job's own steps, the oldest first."""
        return read_attempts(self.database, job_id)


def read_rows(database: Database, table: type[DeclarativeBase], *conditions: Any) -> list[Document]:
    """Return rows as documents, in the order of their keys."""
    statement = select(table.__table__).where(*conditions).order_by(*table.__table__.primary_key)
    return database.read(lambda connection: [dict(row._mapping) for row in connection.execute(statement)])


def read_attempts(database: Database, job_id: str) -> dict[str, list[str]]:
    """Return step kind -> states of all attempts at the steps that the job did not reuse, the oldest first."""
    statement = (
        select(Step.kind, Attempt.state)
        .join(Attempt, Attempt.step_id == Step.id)
        .join(JobStep, JobStep.step_id == Step.id)
        .where(JobStep.job_id == job_id, JobStep.reused.is_(False))
        .order_by(JobStep.position, Attempt.token)
    )
    attempts: dict[str, list[str]] = {}
    for kind, state in database.read(lambda connection: connection.execute(statement).all()):
        attempts.setdefault(kind, []).append(state)
    return attempts


def check_published_once(database: Database, store_dir: Path, job_id: str) -> list[Document]:
    """Assert that each artifact of a job has one publication, one manifest, and the bytes of both; return the rows."""
    rows = read_rows(database, Publication, Publication.job_id == job_id)
    assert rows
    assert len({(row["variant_id"], row["kind"]) for row in rows}) == len(rows)
    for row in rows:
        assert row["published_at"] is not None
        manifest = (store_dir / manifest_key(row["manifest_digest"])).read_bytes()
        assert hashlib.sha256(manifest).hexdigest() == row["manifest_digest"]
        assert manifest == row["manifest"].encode()
    return rows


def check_store(store_dir: Path) -> None:
    """Assert that every object in a store is whole: its bytes have the digest that its name claims."""
    objects = [path for kind in ("blobs", "manifests") for path in (store_dir / kind).rglob("*") if path.is_file()]
    assert objects
    for path in objects:
        claimed = path.name.removesuffix(".json")
        assert hashlib.sha256(path.read_bytes()).hexdigest() == claimed, path


@contextmanager
def fired_up(folder: Path, source_root: Path, **settings: Any) -> Iterator[Kiln]:
    """Yield a running kiln, and leave nothing of it behind."""
    folder.mkdir(parents=True, exist_ok=True)
    kiln = Kiln(folder, source_root, **settings)
    try:
        kiln.start()
        yield kiln
    finally:
        kiln.close()
