"""What a request must pass before any route sees it: Host, Origin, API key, rate limits, size of the body.

Owns four checks as pure ASGI layers, so that they hold for unknown routes and streams alike. They only raise;
`service.api.problems` answers.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.rate_limits import RateLimits
from service.errors import HostNotAllowed, InvalidRequest, OriginNotAllowed, PayloadTooLarge, Unauthorized
from service.ledger.access import LOCAL_CALLER, Caller
from service.settings import Settings

#: Where a request's `Caller` stands in `scope["state"]`; None on the open paths when no key was given.
CALLER = "caller"
#: Answered without a key, and with little in it.
OPEN_PATHS = frozenset({"/healthz", "/readyz"})
#: Takes larger bodies than other routes, and streams them.
UPLOADS_PATH = "/v1/uploads"
RESUMABLE_PATHS = "/v1/uploads/resumable/"
#: How much of a refused body is taken in, and how long.
_DRAIN_BYTES = 64 << 20
_DRAIN_S = 5.0
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


def is_loopback(name: str) -> bool:
    """Whether a host name or address (without port) can only mean this machine."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def host_name(host_header: str) -> str:
    """Return a Host header's name in lower case, without port, brackets and trailing dot."""
    text = host_header.strip().lower()
    name = text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
    return name.rstrip(".")


class HostGuard:
    """Refuses names that are not this server's (DNS rebinding), and changes asked for by other sites' pages."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.names = {host_name(name) for name in (settings.host, *settings.allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check Host, then Origin."""
        if scope["type"] == "http":
            if "\0" in scope["path"] or b"%00" in scope["query_string"]:
                raise InvalidRequest("The request's address holds a NUL character; nothing here is named so.")
            headers = Headers(scope=scope)
            name = host_name(headers.get("host", ""))
            if not self._is_mine(name, scope):
                raise HostNotAllowed(
                    f"This server is not {name!r}. If it should answer to that name, start it with "
                    f"`edgekiln up --allow-host {name or 'NAME'}`.",
                    host=name,
                )
            self._check_origin(scope["method"], headers)
        await self.app(scope, receive, send)

    def _is_mine(self, name: str, scope: Scope) -> bool:
        if is_loopback(name) or name in self.names:
            return True
        # The address that the connection came in on cannot be rebound: it is no name.
        server = scope.get("server")
        return bool(name) and server is not None and name == str(server[0]).lower()

    @staticmethod
    def _check_origin(method: str, headers: Headers) -> None:
        origin = headers.get("origin")
        if method in _SAFE_METHODS or origin is None:
            return
        if urlsplit(origin).netloc.lower() != headers.get("host", "").strip().lower():
            raise OriginNotAllowed(
                f"A page of {origin} may not change anything here. Use the API from a program, or from this "
                "server's own pages.",
                origin=origin,
            )


class KeyGuard:
    """Finds out whose request it is.

    Without a key only the laptop's own user is served: the server listens on loopback and was called by a
    loopback name, by no proxy. A key that is given must be valid, wherever, and is counted against the rate limits.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, authenticate: Callable[[str], Caller], limits: RateLimits
    ) -> None:
        self.app = app
        self.limits = limits
        self.listens_on_loopback = is_loopback(host_name(settings.host))
        self.authenticate = authenticate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Put the caller into the request's state, or raise `Unauthorized` or `RateLimited`."""
        if scope["type"] == "http":
            scope.setdefault("state", {})[CALLER] = await self._caller(scope)
        await self.app(scope, receive, send)

    async def _caller(self, scope: Scope) -> Caller | None:
        headers = Headers(scope=scope)
        authorization = headers.get("authorization")
        if authorization is not None:
            scheme, _, secret = authorization.partition(" ")
            if scheme.lower() != "bearer" or not secret.strip():
                raise Unauthorized("The Authorization header must read `Bearer ek_...`.")
            # A socket of the file system has no address.
            address = (scope.get("client") or ("local", 0))[0]
            return await anyio.to_thread.run_sync(self._admit, secret.strip(), str(address))
        if self.listens_on_loopback and is_loopback(host_name(headers.get("host", ""))) and not _is_forwarded(headers):
            return LOCAL_CALLER
        if scope["path"] in OPEN_PATHS:
            return None
        raise Unauthorized(
            "This server needs an API key: send `Authorization: Bearer ek_...`. `edgekiln keys create NAME` on the "
            "server makes one."
        )

    def _admit(self, secret: str, address: str) -> Caller:
        """Return whose key this is, if neither it nor its sender has come too often."""
        self.limits.require_patience(address)
        try:
            caller = self.authenticate(secret)
        except Unauthorized:
            self.limits.note_wrong_key(address)
            raise
        self.limits.admit(caller)
        return caller


def _is_forwarded(headers: Headers) -> bool:
    """Tell whether a proxy says that it passes on another's request; many of them name the host that they call."""
    return any(name in headers for name in ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip"))


class BodyGuard:
    """Reads a request's body whole, up to the limit, before the route starts; chunked bodies too.

    An upload's body is only counted: its route takes it piece by piece.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.max_body_bytes = settings.max_body_bytes
        self.max_upload_bytes = settings.max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Buffer the body, then hand it on as one message."""
        if scope["type"] != "http" or scope["method"] in _SAFE_METHODS:
            await self.app(scope, receive, send)
            return
        if scope["method"] == "PATCH" and scope["path"].startswith(RESUMABLE_PATHS):
            # Its route knows how many bytes are to come.
            await self.app(scope, receive, send)
            return
        is_upload = scope["path"] == UPLOADS_PATH
        limit_bytes = self.max_upload_bytes if is_upload else self.max_body_bytes
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > limit_bytes:
            if "expect" not in Headers(scope=scope):
                await _drain(receive)
            raise _too_large(limit_bytes)
        if is_upload:
            await self.app(scope, _counted(receive, limit_bytes), send)
            return
        body: Message | None = await self._read(receive)

        async def replay() -> Message:
            nonlocal body
            message, body = body, None
            return message if message is not None else await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive) -> Message:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message
            body += message.get("body", b"")
            if len(body) > self.max_body_bytes:
                raise _too_large(self.max_body_bytes)
            if not message.get("more_body", False):
                return {"type": "http.request", "body": bytes(body), "more_body": False}


async def _drain(receive: Receive) -> None:
    """Take in what is on its way, within bounds: a connection closed on unread bytes is reset, and the answer lost."""
    with anyio.move_on_after(_DRAIN_S):
        drained_bytes = 0
        while drained_bytes < _DRAIN_BYTES:
            message = await receive()
            drained_bytes += len(message.get("body", b""))
            if not message.get("more_body", False):
                return


def _counted(receive: Receive, limit_bytes: int) -> Receive:
    """Pass a body on and raise `PayloadTooLarge` at the first byte above the limit."""
    read_bytes = 0

    async def count() -> Message:
        nonlocal read_bytes
        message = await receive()
        read_bytes += len(message.get("body", b""))
        if read_bytes > limit_bytes:
            raise _too_large(limit_bytes)
        return message

    return count


def _too_large(limit_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"The request's body is larger than {limit_bytes} bytes. Weights do not travel in requests: name a source.",
        limit_bytes=limit_bytes,
    )
