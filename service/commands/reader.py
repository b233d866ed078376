"""Where a job is read: a server, or the ledger of a data directory that nobody serves.

`edgekiln convert` leaves its jobs in a data directory and no server. Called by `service.commands.choice`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from service.choice import DEFAULT_PREFERENCE, Wish, describe_pick
from service.commands import options
from service.commands.output import say
from service.comparison import Candidate, describe_comparison
from service.errors import DataDirBusy, InvalidRequest, NotFound, ServiceUnavailable

if TYPE_CHECKING:
    from service.ledger.database import Database
    from service.settings import Settings

Document = dict[str, Any]


class Reader(Protocol):
    """What answers questions about jobs: `service.client.Client`, or a ledger read directly."""

    def compare(self, job_id: str) -> Document:
        """Return a comparison."""

    def pick(
        self, job_id: str, *, prefer: str | None, format: str | None, engine: str | None, **bounds: float
    ) -> Document:
        """Return a pick."""


class _Ledger:
    """The ledger of a data directory that nobody serves."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def compare(self, job_id: str) -> Document:
        return describe_comparison(*self._read(job_id))

    def pick(
        self, job_id: str, *, prefer: str | None, format: str | None, engine: str | None, **bounds: float
    ) -> Document:
        return describe_pick(*self._read(job_id), Wish(bounds, prefer or DEFAULT_PREFERENCE, format, engine))

    def _read(self, job_id: str) -> tuple[Document, list[Candidate]]:
        from service.ledger import access, candidates

        return candidates.read_candidates(self._database, access.DEFAULT_TENANT, job_id)


def ask(
    url: str | None, api_key: str | None, data_dir: Path | None, question: Callable[[Reader], Document]
) -> Document:
    """Ask the data directory if one is named, else the server; where none was named and none answers, the default
    data directory.
    """
    from service.client_http import URL_VARIABLE

    if data_dir is not None:
        if url is not None:
            raise InvalidRequest("--url and --data-dir name two places; give one.")
        return _ask_data_dir(options.read_settings(data_dir=data_dir), question)
    try:
        with options.connect(url, api_key) as client:
            return question(client)
    except ServiceUnavailable:
        settings = options.read_settings()
        if url or os.environ.get(URL_VARIABLE) or not _has_ledger(settings):
            raise
        say(f"No server answers; reading {settings.data_dir}.")
        return _ask_data_dir(settings, question)


def _has_ledger(settings: Settings) -> bool:
    return bool(settings.database_url) or (settings.data_dir / "ledger.db").is_file()


def _ask_data_dir(settings: Settings, question: Callable[[Reader], Document]) -> Document:
    from service.data_dir import DataDirLock
    from service.ledger import database

    if not _has_ledger(settings):
        raise NotFound(f"{settings.data_dir} holds no jobs: there is no ledger. Name another with --data-dir.")
    lock = DataDirLock(settings.data_dir)
    try:
        lock.acquire()
    except DataDirBusy as busy:
        if "url" not in busy.details:
            raise
        with options.connect(busy.details["url"], None) as client:
            return question(client)
    try:
        database.migrate(settings.ledger_url)
        ledger = database.Database(settings.ledger_url)
        try:
            return question(_Ledger(ledger))
        finally:
            ledger.close()
    finally:
        lock.release()
