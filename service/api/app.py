"""The app factory: routes, guards and problem documents put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio.to_thread
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.middleware import Middleware

from service.api import artifacts, choice, events, health, jobs, logs, schedules, uploads, workers
from service.api.context import Context
from service.api.guards import BodyGuard, HostGuard, KeyGuard
from service.api.problems import ProblemBoundary, install_handlers
from service.api.schemas import TAGS
from service.ledger import access
from service.ledger.database import Database
from service.settings import Settings
from service.storage import ObjectStore

_DESCRIPTION = """\
Turns model checkpoints into artifacts that phones can run, and proves each artifact before anyone downloads it.

Submit a job, follow its events, download what it published. Every failure is an `application/problem+json` document
with a stable `code` and a sentence that says what to do. On loopback no key is needed; on any other address send
`Authorization: Bearer ek_...`.
"""


def make_app(settings: Settings, database: Database, store: ObjectStore) -> FastAPI:
    """Return the API over a migrated ledger; the caller opens and closes `database`."""
    context = Context(settings, database, store)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await anyio.to_thread.run_sync(access.ensure_tenant, database, access.DEFAULT_TENANT)
        yield

    app = FastAPI(
        title="EdgeKiln",
        version="1",
        description=_DESCRIPTION,
        openapi_tags=TAGS,
        lifespan=lifespan,
        # The framework's pages load scripts from elsewhere; /openapi.json feeds any viewer.
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=_operation_id,
        middleware=[
            Middleware(ProblemBoundary),
            Middleware(HostGuard, settings=settings),
            Middleware(KeyGuard, settings=settings, find_caller=partial(access.find_caller, database)),
            Middleware(BodyGuard, settings=settings),
        ],
    )
    app.state.context = context
    install_handlers(app)
    for router in (
        jobs.router,
        uploads.router,
        events.router,
        logs.router,
        artifacts.router,
        choice.router,
        schedules.router,
        workers.router,
        health.router,
    ):
        app.include_router(router)
    _declare_keys(app)
    return app


def _operation_id(route: APIRoute) -> str:
    """Name operations as the functions are named, for generated clients."""
    return route.name


def _declare_keys(app: FastAPI) -> None:
    """Say in the OpenAPI document that keys are bearer tokens (and optional on loopback)."""
    make_document = app.openapi

    def openapi() -> dict[str, Any]:
        document = make_document()
        schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["api_key"] = {"type": "http", "scheme": "bearer", "description": "`ek_...`; not needed on loopback."}
        document["security"] = [{"api_key": []}, {}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]
