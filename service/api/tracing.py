"""A span a request, outside of all that may refuse it."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import tracing

_SERVER_ERRORS = 500


class TraceLayer:
    """Makes a request's span, named by the route that answered; what stands in its query is nobody's business."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on within its span."""
        if scope["type"] != "http" or not tracing.is_on():
            await self.app(scope, receive, send)
            return
        method = scope["method"]
        traceparent = Headers(scope=scope).get(tracing.TRACEPARENT)
        with tracing.request_span(method, traceparent) as span:

            async def note(message: Message) -> None:
                if message["type"] == "http.response.start":
                    status = message["status"]
                    span.note(http__response__status_code=status)
                    if status >= _SERVER_ERRORS:
                        span.fail(f"HTTP {status}")
                await send(message)

            try:
                await self.app(scope, receive, note)
            finally:
                route = getattr(scope.get("route"), "path", None)
                span.rename(f"{method} {route}" if route else method)
                span.note(http__request__method=method, http__route=route)
