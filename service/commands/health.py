"""`edgekiln health`: whether a process of this installation does its work, for whoever restarts those that do not.

Runs beside the process, with the same settings: in its container or pod, or as a monitor's check on its host.
"""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands import options
from service.commands.output import print_json, say
from service.errors import InvalidSettings, ServiceUnavailable

if TYPE_CHECKING:
    from service.settings import Settings

HEALTH_EPILOG = """Examples:

\b
  edgekiln health api
  EDGEKILN_WORKER_FILE=/run/edgekiln/worker edgekiln health worker
  edgekiln health beat
"""
#: Celery's beat writes its schedule every three minutes, at its next tick (`service.queue`); twice as long is too long.
_BEAT_SILENCE_S = 420.0
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}
#: Files of the beat's schedule: a suffix or none, by the database module that Python has.
_SCHEDULE = "beat-schedule*"


class Part(StrEnum):
    """A process of the distributed profile."""

    API = "api"
    WORKER = "worker"
    BEAT = "beat"


def health(
    part: Annotated[Part, typer.Argument(metavar="api|worker|beat", help="Which process.")],
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Say whether the API, the worker or the beat that runs here does its work.

    The API must answer, the ledger must have heard of the worker, the beat must have written its schedule.
    """
    settings = options.read_settings(data_dir=data_dir)
    checks = {Part.API: _check_api, Part.WORKER: _check_worker, Part.BEAT: _check_beat}
    document = checks[part](settings)
    if as_json:
        print_json({"part": part.value, **document})
    else:
        say(document["message"])


def _check_api(settings: Settings) -> dict[str, Any]:
    from service.client import Client

    host = _WILDCARDS.get(settings.host, f"[{settings.host}]" if ":" in settings.host else settings.host)
    with Client(f"http://{host}:{settings.port}") as client:
        client.health()
    return {"message": "The API answers."}


def _check_worker(settings: Settings) -> dict[str, Any]:
    from service.ledger import fleet
    from service.ledger.database import Database

    if not settings.worker_file:
        raise InvalidSettings("EDGEKILN_WORKER_FILE is empty: nobody knows which worker is meant. Set it for both.")
    path = Path(settings.worker_file)
    if not path.exists():
        raise ServiceUnavailable(f"There is no {path}: the worker has not started yet.")
    worker_id = path.read_text().strip()
    database = Database(settings.ledger_url)
    try:
        is_heard = fleet.is_heard(database, worker_id, fleet.WORKER_SILENCE_S)
    finally:
        database.close()
    if not is_heard:
        raise ServiceUnavailable(
            f"The ledger has not heard of worker {worker_id} for {fleet.WORKER_SILENCE_S:g} s. See its log."
        )
    return {"worker": worker_id, "message": f"The ledger has heard of worker {worker_id}."}


def _check_beat(settings: Settings) -> dict[str, Any]:
    written_at = max((path.stat().st_mtime for path in settings.data_dir.glob(_SCHEDULE)), default=None)
    if written_at is None:
        raise ServiceUnavailable(f"There is no schedule in {settings.data_dir}: the beat has not started yet.")
    silence_s = time.time() - written_at
    if silence_s > _BEAT_SILENCE_S:
        raise ServiceUnavailable(f"The beat has not written its schedule for {silence_s:.0f} s. See its log.")
    return {"silence_s": silence_s, "message": f"The beat wrote its schedule {silence_s:.0f} s ago."}
