"""HTTP as the SDK speaks it: patience where the server asks for it, streams, and failures as errors of ours.

Owns how what httpx raises, and the problem documents of the server, become the errors of `service.errors`. Knows no
route. Called by `service.client`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, BinaryIO

import httpx

from service import tracing
from service.errors import EdgeKilnError, InvalidSettings, RemoteError, ServiceUnavailable

URL_VARIABLE = "EDGEKILN_URL"

_CHUNK_BYTES = 1 << 20


def hand_on_trace(request: httpx.Request) -> None:
    """Let a server's work appear in the trace of the program that asks for it."""
    traceparent = tracing.current_traceparent()
    if traceparent is not None:
        request.headers[tracing.TRACEPARENT] = traceparent


class PatientHttp(httpx.Client):
    """Sends a request again when the server asks for that: 429 with `Retry-After`."""

    def __init__(self, *, patience_s: float, **options: Any) -> None:
        super().__init__(**options)
        self._patience_s = patience_s

    def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Send a request, and wait as long as the server says, within the patience."""
        give_up_at = time.monotonic() + self._patience_s
        while True:
            response = super().send(request, **options)
            after = response.headers.get("Retry-After", "")
            is_early = response.status_code == httpx.codes.TOO_MANY_REQUESTS and after.isdigit()
            if not is_early or time.monotonic() + int(after) > give_up_at:
                return response
            response.close()
            time.sleep(int(after))


class Body:
    """A file as a request's body, from its start each time that it is sent."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        self._stream.seek(0)
        while chunk := self._stream.read(_CHUNK_BYTES):
            yield chunk


class Stream:
    """A streamed answer whose failures, at any point, are EdgeKiln's."""

    def __init__(
        self, http: httpx.Client, url: str, path: str, headers: Mapping[str, str], params: Mapping[str, Any]
    ) -> None:
        self._errors = reported_errors(url)
        # Bytes count as the server counts them only when nobody compresses them on the way.
        self._opening = http.stream("GET", path, headers={"Accept-Encoding": "identity", **headers}, params=params)

    def __enter__(self) -> httpx.Response:
        with self._errors:
            response = self._opening.__enter__()
            if response.is_success:
                return response
            response.read()
        self._opening.__exit__(None, None, None)
        raise read_problem(response)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opening.__exit__(kind, error, trace)
        self._errors.__exit__(kind, error, trace)


class reported_errors:  # noqa: N801 - reads as a block
    """Turns what httpx raises into `ServiceUnavailable`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, httpx.ConnectError):
            raise ServiceUnavailable(
                f"Nothing answers at {self.url}. Start a server with `edgekiln up`, or name another with --url or "
                f"{URL_VARIABLE}.",
                url=self.url,
            ) from error
        if isinstance(error, httpx.HTTPError):
            raise ServiceUnavailable(
                f"{self.url} broke off ({type(error).__name__}: {error}). Try again.", url=self.url
            ) from error
        if isinstance(error, httpx.InvalidURL):
            raise InvalidSettings(f"{self.url!r} is not a server's URL: {error}.") from error


def parse_events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Read server-sent events; comments and fields of no use are skipped."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
            continue
        if "data" in fields:
            data = json.loads(fields["data"])
            yield {
                "number": int(fields.get("id", 0)),
                "kind": fields.get("event", "message"),
                "created_at": data.pop("created_at", None),
                "data": data,
            }
        fields = {}


def _classes(root: type[EdgeKilnError] = EdgeKilnError) -> dict[str, type[EdgeKilnError]]:
    """Code -> error class; the first in the tree wins."""
    found = {} if root is RemoteError else {root.code: root}
    for child in root.__subclasses__():
        found = {**_classes(child), **found}
    return found


def read_problem(response: httpx.Response) -> EdgeKilnError:
    """Return the error that a problem document tells of, typed if its code is known here."""
    try:
        document = response.json()
    except ValueError:
        document = None
    if not isinstance(document, dict) or "code" not in document:
        return ServiceUnavailable(
            f"The server answered {response.status_code} without saying why. Is {response.url} an EdgeKiln server's?",
            status=response.status_code,
        )
    details = dict(document.get("details") or {})
    known = _classes().get(str(document["code"]))
    if known is not None and "message" not in details and known.retryable == bool(document.get("retryable")):
        return known(str(document.get("detail", "")), **details)
    return RemoteError(
        {
            "code": document["code"],
            "message": document.get("detail", "no message"),
            "retryable": bool(document.get("retryable", False)),
            "details": details,
        }
    )
