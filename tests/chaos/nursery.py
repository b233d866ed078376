"""Where workers of a storm come from: a process that has imported what a worker needs, and forks one when asked.

A storm kills more workers than two cores could start by `python -m celery`: what a worker imports would be all that
they do. What is forked here runs Celery's own command with the same arguments; only its imports are done. Run as
`python -m tests.chaos.nursery`; `Nursery` is the other end of its pipes.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

#: What a worker imports before it takes a step, but for `workers.app`, which reads its settings when it is imported.
_MODULES = (
    "alembic.command",
    "boto3",
    "celery.__main__",
    "celery.apps.worker",
    "celery.bin.celery",
    "celery.concurrency.thread",
    "celery.worker",
    "kombu.transport.redis",
    "migrations",
    "psycopg",
    "redis",
    "service.metrics",
    "service.process_log",
    "sqlalchemy.dialects.postgresql.psycopg",
    "tests.chaos.light_catalog",
    "workers.tasks",
)


class ForkedWorker:
    """A worker that a nursery has forked; the nursery reaps it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        #: None when it has ended before anybody could look.
        self._fd: int | None = None
        with suppress(ProcessLookupError):
            self._fd = os.pidfd_open(pid)

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        if self._fd is not None and select.select([self._fd], [], [], 0)[0]:
            os.close(self._fd)
            self._fd = None
        return self._fd is not None

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, if it still lives: to this process and to no other that is given its pid."""
        if self.is_alive():
            assert self._fd is not None
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, number)

    def wait(self) -> None:
        """Return when it has ended."""
        if self.is_alive():
            assert self._fd is not None
            select.select([self._fd], [], [])


class Nursery:
    """Forks workers with `environment`; ends with whoever made it."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self._log = folder / "worker.log"
        command = [sys.executable, "-W", "ignore", "-m", "tests.chaos.nursery"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=dict(environment), cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )

    def fork(self, arguments: list[str], settings: Mapping[str, str]) -> ForkedWorker:
        """Start `celery ARGUMENTS` with further variables of the environment."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([arguments, dict(settings)]).encode() + b"\n")
        self._process.stdin.flush()
        return ForkedWorker(int(self._process.stdout.readline()))

    def close(self) -> None:
        """End it, and not the workers."""
        with self._process:
            self._process.kill()


def main() -> None:
    """Import, then fork a worker for every line that comes, and say its pid."""
    for name in _MODULES:
        importlib.import_module(name)
    gc.collect()
    # Collections in a worker would copy every page that it shares with this process.
    gc.freeze()
    # Nobody here asks how a worker has ended; without this it would stay as a zombie.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    answers = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.close(answers)
            _become_worker(*json.loads(line))
        os.write(answers, b"%d\n" % pid)


def _become_worker(arguments: list[str], settings: dict[str, str]) -> None:
    from celery.__main__ import main as celery

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(settings)
    sys.argv = ["celery", *arguments]
    celery()
    sys.exit()


if __name__ == "__main__":
    main()
