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

from service.api import (
    artifacts,
    choice,
    devices,
    events,
    health,
    jobs,
    keys,
    logs,
    measurements,
    resumable,
    schedules,
    tokens,
    uploads,
    workers,
)
from service.api.assembly import Assembler
from service.api.context import Context, find_scopes
from service.api.guards import BodyGuard, HostGuard, KeyGuard
from service.api.problems import ProblemBoundary, install_handlers
from service.api.rate_limits import RateLimits
from service.api.schemas import TAGS
from service.api.tracing import TraceLayer
from service.ledger import access
from service.ledger.database import Database
from service.settings import Settings
from service.storage import ObjectStore

ROUTERS = (
    jobs.router,
    uploads.router,
    resumable.router,
    events.router,
    logs.router,
    artifacts.router,
    measurements.router,
    choice.router,
    schedules.router,
    workers.router,
    devices.router,
    keys.router,
    tokens.router,
    health.router,
)

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
        await anyio.to_thread.run_sync(app.state.assembler.close)

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
            Middleware(TraceLayer),
            Middleware(ProblemBoundary),
            Middleware(HostGuard, settings=settings),
            Middleware(
                KeyGuard,
                settings=settings,
                authenticate=partial(access.authenticate, database),
                limits=RateLimits(settings),
            ),
            Middleware(BodyGuard, settings=settings),
        ],
    )
    app.state.context = context
    app.state.assembler = Assembler(context)
    install_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    _declare_keys(app)
    return app


def _operation_id(route: APIRoute) -> str:
    """Name operations as the functions are named, for generated clients."""
    return route.name


def _declare_keys(app: FastAPI) -> None:
    """Say in the OpenAPI document that keys are bearer tokens (and optional on loopback), and what scope each needs."""
    make_document = app.openapi

    def openapi() -> dict[str, Any]:
        document = make_document()
        schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["api_key"] = {"type": "http", "scheme": "bearer", "description": "`ek_...`; not needed on loopback."}
        for route in list_routes():
            for method in (route.methods or set()) & {name.upper() for name in document["paths"].get(route.path, {})}:
                demands = [{"api_key": sorted(find_scopes(route.dependant))}, {}]
                document["paths"][route.path][method.lower()]["security"] = demands
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def list_routes() -> list[APIRoute]:
    """Return every route of ours."""
    return [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
