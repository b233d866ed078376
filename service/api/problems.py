"""Failures as `application/problem+json` (RFC 9457), always with a stable `code`.

Owns the one translation from exceptions to HTTP answers. Every other module of this room raises errors from
`service.errors`; nothing leaks that was not written for a user's eyes.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import (
    EdgeKilnError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    OriginNotAllowed,
    PayloadTooLarge,
    RangeNotSatisfiable,
    RateLimited,
    Unauthorized,
)
from service.requests import invalid_request

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
_SERVER_ERROR = 500
_UNAVAILABLE = 503
#: What the validator says of a body that is no JSON object at all.
_NOT_AN_OBJECT = frozenset({"missing", "model_attributes_type", "model_type", "dict_type"})
#: What the framework itself answers, in this service's words.
_BY_STATUS: dict[int, type[EdgeKilnError]] = {
    401: Unauthorized,
    403: OriginNotAllowed,
    404: NotFound,
    405: MethodNotAllowed,
    413: PayloadTooLarge,
    416: RangeNotSatisfiable,
}


def status_of(error: EdgeKilnError) -> int:
    """Return the HTTP status of an error; what may work later is 503 unless the error says otherwise."""
    if error.http_status == _SERVER_ERROR and error.retryable:
        return _UNAVAILABLE
    return error.http_status


def describe_problem(error: EdgeKilnError, status: int | None = None) -> dict[str, Any]:
    """Return the problem document of an error."""
    return {**error.to_problem(), "status": status or status_of(error)}


def make_problem_response(
    error: EdgeKilnError, status: int | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return the HTTP answer to an error."""
    document = describe_problem(error, status)
    all_headers = {"Cache-Control": "no-store", **(headers or {})}
    if isinstance(error, Unauthorized):
        all_headers["WWW-Authenticate"] = 'Bearer realm="edgekiln"'
    if isinstance(error, RangeNotSatisfiable) and "size_bytes" in error.details:
        all_headers["Content-Range"] = f"bytes */{error.details['size_bytes']}"
    if isinstance(error, RateLimited):
        all_headers["Retry-After"] = str(error.details["retry_after_s"])
    if isinstance(error, PayloadTooLarge):
        # The rest of the body is not read.
        all_headers["Connection"] = "close"
    return _Answer(document, status_code=document["status"], headers=all_headers, media_type=MEDIA_TYPE)


class _Answer(JSONResponse):
    """JSON that may repeat what a request held, half a surrogate pair among it, which no encoding takes."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def install_handlers(app: FastAPI) -> None:
    """Answer everything that a route raises, and what the framework itself refuses, with problem documents."""
    app.add_exception_handler(EdgeKilnError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_framework)


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, EdgeKilnError)
    if status_of(error) >= _SERVER_ERROR:
        log.warning("%s %s: %s: %s", request.method, request.url.path, error.code, error.message)
    return make_problem_response(error)


async def _answer_invalid(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = list(error.errors())
    if any(item["type"] == "json_invalid" or _is_no_object(item) for item in problems):
        return make_problem_response(
            InvalidRequest("The request's body must be one JSON object, sent as `Content-Type: application/json`.")
        )
    # Where a parameter travels does not matter to its reader.
    return make_problem_response(invalid_request([{**item, "loc": tuple(item["loc"])[1:]} for item in problems]))


def _is_no_object(problem: Mapping[str, Any]) -> bool:
    return tuple(problem["loc"]) == ("body",) and problem["type"] in _NOT_AN_OBJECT


async def _answer_framework(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    known = _BY_STATUS.get(error.status_code, InvalidRequest if error.status_code < _SERVER_ERROR else EdgeKilnError)
    sentences = {
        404: f"There is nothing at {request.url.path}. /openapi.json lists what there is.",
        405: f"{request.url.path} does not take {request.method}.",
    }
    message = sentences.get(error.status_code, f"{error.detail}.")
    headers = dict(error.headers or {})
    if known is MethodNotAllowed:
        # The router names the methods of the first route alone.
        headers["Allow"] = ", ".join(sorted(_allowed_methods(request)))
    return make_problem_response(known(message), status=error.status_code, headers=headers)


def _allowed_methods(request: Request) -> set[str]:
    """Return the methods of every route that has this path."""
    methods: set[str] = set()
    for template, operations in request.app.openapi()["paths"].items():
        if compile_path(template)[0].match(request.url.path):
            methods |= {name.upper() for name in operations}
    return methods


class ProblemBoundary:
    """The outermost layer: what the guards refuse becomes a problem document, and so does what nobody foresaw."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and answer whatever it raises."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_begun = False

        async def watch(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except EdgeKilnError as error:
            if has_begun:
                # Too late for an answer: an aborted body is all that can tell the client.
                log.warning("%s %s was cut off: %s", scope["method"], scope["path"], error.message)
                raise
            await make_problem_response(error)(scope, receive, send)
        except Exception:
            incident = secrets.token_hex(4)
            log.exception("incident %s: %s %s failed", incident, scope["method"], scope["path"])
            if has_begun:
                raise
            failure = EdgeKilnError(
                f"The server made an error. Its log has the particulars under incident {incident}.", incident=incident
            )
            await make_problem_response(failure)(scope, receive, send)
