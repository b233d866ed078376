"""Servers that a storm may kill: its own PostgreSQL and Redis, on ports that stay; and the S3 server beside them.

Whatever tests share elsewhere is never touched. Killed means SIGKILL for every process of the server; what it had
acknowledged is in its files, for the machine itself goes on.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests import services
from tests.chaos import scale
from tests.kiln import find_children, is_alive, wait_for
from tests.services import find_postgres, free_port, give_up

BUCKET = "artifacts"


class Killable(Protocol):
    """What a storm hits."""

    url: str

    def kill(self) -> None:
        """End it at once, with all its processes."""

    def start(self) -> None:
        """Start it on the same files and port; return when it answers."""


class Postgres:
    """A PostgreSQL of one's own in `folder`, which its user must be able to enter."""

    def __init__(self, folder: Path) -> None:
        pg_ctl = find_postgres()
        # The server refuses to run as root.
        self._user: dict[str, Any] = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
        if self._user:
            self._user["extra_groups"] = []
            shutil.chown(folder, "postgres")
        self._program, self._data, self._port = pg_ctl.with_name("postgres"), folder / "data", free_port()
        self._log = folder / "log"
        initdb = [pg_ctl.with_name("initdb"), "-D", self._data, "-U", "postgres", "-A", "trust", "-E", "UTF8"]
        subprocess.run(initdb, check=True, capture_output=True, cwd=folder, **self._user)
        self.url = f"postgresql+psycopg://postgres@127.0.0.1:{self._port}/postgres"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """See `Killable`; the files of a killed server are recovered first."""

        def answers() -> bool:
            if self._process is None or self._process.poll() is not None:
                # The first may find the shared memory of the killed one still in use.
                self._process = self._launch()
            with suppress(psycopg.OperationalError):
                psycopg.connect(self.url.replace("+psycopg", ""), connect_timeout=5).close()
                return True
            return False

        wait_for(answers, "PostgreSQL answers")

    def make_database(self) -> str:
        """Make an empty database; return its URL."""
        return services.make_database(self.url, f"chaos_{secrets.token_hex(4)}")

    def _launch(self) -> subprocess.Popen[bytes]:
        options = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": "300",
            # Processes are killed here, machines are not.
            "fsync": "off",
        }
        command = [str(self._program), "-D", str(self._data), "-p", str(self._port)]
        command += [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with self._log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=self._data, **self._user)

    def kill(self) -> None:
        """See `Killable`."""
        if self._process is None:
            return
        pids = [self._process.pid, *find_children(self._process.pid)]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        wait_for(lambda: not any(map(is_alive, pids)), "PostgreSQL is dead")
        self._process = None


class Redis:
    """A Redis of one's own in `folder`, with the append-only file that the deployment has."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server")
        if program is None:
            give_up("no Redis: install the server")
        port = free_port()
        self._command = [program, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)]
        self._command += ["--save", "", "--appendonly", "yes", "--maxmemory-policy", "noeviction"]
        self.url = f"redis://127.0.0.1:{port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def connect(self) -> redis.Redis:
        """Open a connection that does not try again by itself."""
        return redis.Redis.from_url(self.url, retry=Retry(NoBackoff(), 0), socket_timeout=5)

    def start(self) -> None:
        """See `Killable`."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)

        def answers() -> bool:
            with suppress(redis.RedisError), self.connect() as client:
                return bool(client.ping())
            return False

        wait_for(answers, "Redis answers")

    def kill(self) -> None:
        """See `Killable`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def flush(self) -> None:
        """Forget every message, if there is a server to forget them."""
        with suppress(redis.RedisError), self.connect() as client:
            client.flushall()


@contextmanager
def running(kind: type[Postgres] | type[Redis]) -> Iterator[Any]:
    """Yield a started server; leave nothing of it."""
    with tempfile.TemporaryDirectory(prefix="edgekiln-chaos-") as folder:
        # Its own user must get there.
        Path(folder).chmod(0o755)
        server = kind(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.kill()


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Yield how to reach an S3 server with an empty bucket; nobody kills it."""
    with (
        tempfile.TemporaryDirectory(prefix="edgekiln-s3-") as folder,
        services.s3_server(Path(folder, "s3"), scale.S3_SERVER) as address,
    ):
        services.make_bucket(address, BUCKET)
        yield address
