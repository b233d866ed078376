"""Whether the process lives (`/healthz`) and whether work can be done (`/readyz`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError

from service.api.context import Context, ContextOf
from service.api.guards import CALLER
from service.api.schemas import Health, Readiness, answers
from service.errors import EdgeKilnError
from service.ledger import fleet
from service.ledger.database import ping
from service.storage import ObjectStore

router = APIRouter(tags=["health"])

#: The store's check writes, so that its answer is kept for a moment.
_STORE_CHECK_S = 5.0


class _StoreProbe:
    """Checks the store at most once every few seconds, whoever asks."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._checked_at = float("-inf")

    def __call__(self) -> str:
        with self._lock:
            if time.monotonic() - self._checked_at > _STORE_CHECK_S:
                self.store.check()
                self._checked_at = time.monotonic()
        return "The store takes and returns bytes."


@router.get(
    "/healthz",
    summary="Is the process alive?",
    response_model=None,
    responses=answers(Health, "It is."),
)
def read_health() -> JSONResponse:
    """Answer without touching anything."""
    return JSONResponse({"status": "ok"})


@router.get(
    "/readyz",
    summary="Can work be done?",
    response_model=None,
    responses={
        **answers(Readiness, "Database, store and workers are there."),
        **answers(Readiness, "Something is missing; each check says what.", 503),
    },
)
def read_readiness(request: Request, context: ContextOf) -> JSONResponse:
    """Check database, store and workers; whoever gave no key where one is needed sees only which check fails."""
    if not hasattr(request.app.state, "store_probe"):
        request.app.state.store_probe = _StoreProbe(context.store)
    workers: list[dict[str, Any]] = []
    checks = {
        "database": _check(lambda: _check_database(context)),
        "store": _check(request.app.state.store_probe),
        "workers": _check(lambda: _check_workers(context, workers)),
    }
    is_ready = all(check["ok"] for check in checks.values())
    document: dict[str, Any] = {"ready": is_ready, "checks": checks}
    if getattr(request.state, CALLER, None) is None:
        document["checks"] = {name: {"ok": check["ok"]} for name, check in checks.items()}
    else:
        document["workers"] = workers
    headers = {"Cache-Control": "no-store"}
    return JSONResponse(document, status_code=200 if is_ready else 503, headers=headers)


def _check(probe: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"ok": True, "message": probe()}
    except EdgeKilnError as error:
        return {"ok": False, "message": error.message}
    except SQLAlchemyError as error:
        return {"ok": False, "message": f"The database does not answer as it should ({type(error).__name__})."}


def _check_database(context: Context) -> str:
    ping(context.database)
    return "The database answers."


def _check_workers(context: Context, workers: list[dict[str, Any]]) -> str:
    # A worker that has missed its heartbeats for a whole lease has lost its steps too.
    window_s = context.settings.lease_s
    workers += fleet.list_workers(context.database, window_s)
    if not workers:
        raise EdgeKilnError(
            f"No worker has been heard of for {window_s:g} s; jobs wait until one starts. See the worker's log."
        )
    return f"{len(workers)} worker{'s' if len(workers) > 1 else ''} heard of within {window_s:g} s."
