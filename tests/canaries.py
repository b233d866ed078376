"""Canaries: secrets that nothing but their place may hold, and the search for them everywhere else.

Owns the search through files, a ledger, a Redis and running children; tests say what the secrets are and run the jobs.
Called by `tests/chaos/test_canaries.py`.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import redis

from service.ledger import copy
from service.ledger.database import Database
from tests.kiln import Kiln, find_processes

#: Where something was found -> the names of the canaries.
Leaks = dict[str, set[str]]
_LOOK_S = 0.02


def make_canary(name: str) -> str:
    """Return a secret that occurs nowhere by chance."""
    return f"{name}canary{secrets.token_hex(12)}"


def search(canaries: Mapping[str, str], place: str, data: bytes | str) -> Leaks:
    """Return which canaries a text holds."""
    text = data.encode() if isinstance(data, str) else data
    found = {name for name, canary in canaries.items() if canary.encode() in text}
    return {place: found} if found else {}


def search_files(canaries: Mapping[str, str], folder: Path) -> Leaks:
    """Search every file below a folder: logs, store, ledger, broker, folders of steps, caches."""
    leaks: Leaks = {}
    # Unlike `rglob`, it minds no folder that goes meanwhile.
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            with suppress(FileNotFoundError):
                if path.is_file():
                    leaks |= search(canaries, str(path.relative_to(folder)), path.read_bytes())
    return leaks


def search_ledger(canaries: Mapping[str, str], database: Database, scratch: Path) -> Leaks:
    """Search every row of every table."""
    with scratch.open("w") as stream:
        copy.write_rows(database, stream)
    rows = scratch.read_text()
    scratch.unlink()
    return search(canaries, "ledger", rows)


def search_redis(canaries: Mapping[str, str], server: redis.Redis) -> Leaks:
    """Search every key and value."""
    leaks: Leaks = {}
    for key in server.scan_iter():
        leaks |= search(canaries, f"redis key {key!r}", bytes(key) + bytes(server.dump(key) or b""))  # type: ignore[arg-type]
    return leaks


class Eavesdropper:
    """Notes every command that a Redis is given, from a thread of its own."""

    def __init__(self, server: redis.Redis) -> None:
        self._monitor = server.monitor()
        self.heard: list[str] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Eavesdropper:
        self._monitor.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._monitor.connection.disconnect()
        self._thread.join()

    def _listen(self) -> None:
        with suppress(Exception):  # the connection is cut at the end
            for command in self._monitor.listen():
                self.heard.append(str(command["command"]))


class Watcher:
    """Looks, while jobs run, into zygotes, children and their folders: environments, command lines, files."""

    def __init__(self, canaries: Mapping[str, str], kiln: Kiln) -> None:
        self._canaries = canaries
        self._kiln = kiln
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.leaks: Leaks = {}
        #: Processes that were looked into.
        self.seen: set[int] = set()
        self.failure: Exception | None = None

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def _watch(self) -> None:
        try:
            while not self._is_over.wait(_LOOK_S):
                self._look()
        except Exception as error:
            self.failure = error

    def _look(self) -> None:
        zygotes = [pid for pid, command in find_processes(self._kiln.folder).items() if "sandbox.zygote" in command]
        for pid in {*zygotes, *self._kiln.step_pids()} - self.seen:
            with suppress(OSError):
                for name in ("environ", "cmdline"):
                    text = Path(f"/proc/{pid}/{name}").read_bytes()
                    self.leaks |= search(self._canaries, f"{name} of a child", text)
                self.seen.add(pid)
        self.leaks |= search_files(self._canaries, self._kiln.data_dir / "work")


def merge(found: Iterable[Leaks]) -> Leaks:
    """Return all leaks together."""
    merged: Leaks = {}
    for leaks in found:
        for place, names in leaks.items():
            merged.setdefault(place, set()).update(names)
    return merged


def tell(document: Any) -> str:
    """Return all that an answer says, for a search."""
    return f"{getattr(document, 'headers', '')}{getattr(document, 'text', document)}"
