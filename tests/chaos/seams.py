"""The seams of a worker's work, found by watching it: every commit to the ledger and every write to the store.

Nobody lists them, so none is forgotten: whatever goes through `Database.write` or a writing door of the store is one,
and a commit that goes past `Database.write` shows as such. What happens at a seam, the caller says:
nothing, to find them; a crash; a sweep. Used by `test_every_seam`.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event

from service.ledger.claims import Claim
from service.ledger.database import Database
from service.settings import load_settings
from service.storage import ObjectStore
from tests.chaos import light_catalog
from workers.process import WorkerProcess
from workers.runner import Runner

#: What changes a store; the other doors of the protocol read.
STORE_WRITES = frozenset({"put_file", "put_bytes", "delete", "abort_stale_uploads"})
STORE_READS = frozenset({"open", "get_file", "stat", "list", "check", "shares_disk_with"})
CLASSES = ("fetch", "convert", "light")
_PAST_WRITE = "past Database.write"


@dataclass(frozen=True)
class Seam:
    """A moment between two effects that others can see."""

    #: Kind of the step that is under way; empty while one is claimed.
    kind: str
    #: The ledger's function that commits, or the store's that writes.
    place: str
    #: `before`; `inside`, which is before a commit is sent or a whole file is given its name; `after`.
    moment: str


class Watch:
    """Calls `strike` at every seam of the steps that this thread runs, while it is open."""

    def __init__(self, store: ObjectStore, strike: Callable[[Seam], None]) -> None:
        self._store = store
        self._strike = strike
        self._thread = threading.get_ident()
        self._kind = ""
        self._writing = ""

    @contextmanager
    def open(self) -> Iterator[None]:
        """Watch, and leave everything as it was."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Runner, "_run", self._wrap_run(Runner._run))
            patch.setattr(Database, "write", self._wrap_write(Database.write))
            for name in STORE_WRITES:
                patch.setattr(self._store, name, self._wrap_store(name, getattr(self._store, name)))
            patch.setattr(os, "link", self._wrap_link(os.link))
            event.listen(Engine, "commit", self._on_commit)
            try:
                yield
            finally:
                event.remove(Engine, "commit", self._on_commit)

    def _meet(self, place: str, moment: str) -> None:
        if threading.get_ident() == self._thread:
            self._strike(Seam(self._kind, place, moment))

    def _wrap_run(self, run: Any) -> Any:
        def call(runner: Runner, claim: Claim, *arguments: Any) -> Any:
            self._kind = claim.kind
            try:
                return run(runner, claim, *arguments)
            finally:
                self._kind = ""

        return call

    def _wrap_write(self, write: Any) -> Any:
        def call(database: Database, function: Any) -> Any:
            if threading.get_ident() != self._thread:
                return write(database, function)
            wrapped = inspect.getclosurevars(function).nonlocals.get("function", function)
            name = str(wrapped.__name__)
            self._meet(name, "before")
            self._writing = name
            try:
                result = write(database, function)
            finally:
                self._writing = ""
            self._meet(name, "after")
            return result

        return call

    def _on_commit(self, connection: Connection) -> None:
        options = connection.get_execution_options()
        if not options.get("is_read") and "isolation_level" not in options:
            self._meet(self._writing or _PAST_WRITE, "inside")

    def _wrap_store(self, name: str, write: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self._meet(name, "before")
            result = write(*arguments, **options)
            self._meet(name, "after")
            return result

        return call

    def _wrap_link(self, link: Any) -> Any:
        def call(source: Any, target: Any, **options: Any) -> None:
            if "/blobs/" in str(target) or "/manifests/" in str(target):
                self._meet("link", "inside")
            link(source, target, **options)

        return call


def find_seams(process: WorkerProcess, run: Callable[[], None]) -> list[Seam]:
    """Return the seams that a run meets, in their order, each once."""
    found: dict[Seam, None] = {}
    with Watch(process.store, lambda seam: found.update({seam: None})).open():
        run()
    assert not [seam for seam in found if seam.place == _PAST_WRITE]
    return list(found)


def crash_at(settings: Mapping[str, Any], environment: Mapping[str, str], seam: Seam) -> None:
    """Let a worker process run what is due, and die by SIGKILL when it comes to a seam; it must come there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    worker = context.Process(target=_run_and_crash, args=(dict(settings), dict(environment), seam))
    worker.start()
    worker.join(120)
    ended = worker.exitcode
    worker.kill()
    assert ended == -signal.SIGKILL, f"{seam} was not met"


def _run_and_crash(settings: Mapping[str, Any], environment: Mapping[str, str], seam: Seam) -> None:
    os.environ.update(environment)
    light_catalog.install()
    process = WorkerProcess(load_settings(dict(settings)), lambda _classes: None)

    def strike(met: Seam) -> None:
        if met == seam:
            os.kill(os.getpid(), signal.SIGKILL)

    with Watch(process.store, strike).open():
        for _ in range(1000):
            if not any(process.runner.run_next(name) for name in CLASSES):
                threading.Event().wait(0.02)
    sys.exit(1)
