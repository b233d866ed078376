"""Every route that an app answers, as the framework finds it: hidden ones and those of included routers too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute


def walk_routes(app: FastAPI) -> list[Any]:
    """Return the routes of an app with `path` and `methods`, `/openapi.json` among them."""
    return list(_walk(app.routes))


def _walk(routes: Iterable[BaseRoute]) -> Iterator[Any]:
    for route in routes:
        inner = getattr(route, "original_router", route)
        if isinstance(route, APIRoute) or not hasattr(inner, "routes"):
            assert hasattr(route, "path"), f"a kind of route that nobody knows here: {route!r}"
            yield route
        else:
            yield from _walk(inner.routes)


def list_operations(app: FastAPI) -> list[tuple[str, str]]:
    """Return (method, path) of every operation, HEAD among them."""
    return sorted((method, route.path) for route in walk_routes(app) for method in route.methods)
