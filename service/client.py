"""The SDK: the REST API as Python calls.

Owns HTTP from the caller's side: problem documents become the errors of `service.errors`, streams and downloads take
up where they broke off. Knows neither ledger nor store. Called by `service.cli` and by users' programs.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from service.downloads import fetch_artifact, fetch_manifest
from service.errors import BlobCorrupt, EdgeKilnError, InvalidSettings, RemoteError, ServiceUnavailable
from service.requests import JobRequest

DEFAULT_URL = "http://127.0.0.1:8711"
URL_VARIABLE = "EDGEKILN_URL"
KEY_VARIABLE = "EDGEKILN_API_KEY"

#: JSON objects as the API sends them.
Document = dict[str, Any]
Documents = list[Document]
OnEvent = Callable[[Document], None]

#: Longer than the server's silence between two signs of life on an event stream.
_READ_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 10.0
#: How long a stream that breaks is taken up again without one event arriving.
_PATIENCE_S = 60.0
_RECONNECT_S = 1.0
#: Between two looks at logs that are followed, and how much of each is read at a look.
_FOLLOW_S = 1.0
_FOLLOWED_BYTES = 64 << 10
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Client:
    """A connection to one EdgeKiln server; use it as a context manager or call `close`.

    `url` and `api_key` default to `EDGEKILN_URL` and `EDGEKILN_API_KEY`. Methods raise the errors of
    `service.errors`: the server's own by their code, and `ServiceUnavailable` when it cannot be reached. Event
    streams are taken up again for `patience_s` seconds after the last event.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        patience_s: float = _PATIENCE_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.patience_s = patience_s
        self.url = (url or os.environ.get(URL_VARIABLE) or DEFAULT_URL).rstrip("/")
        key = api_key or os.environ.get(KEY_VARIABLE)
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidSettings(f"{self.url!r} is not a server's URL; it must look like {DEFAULT_URL}.")
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
            # A proxy cannot reach this machine's loopback.
            trust_env=parts.hostname not in _LOOPBACK,
            transport=transport,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    # --- jobs ------------------------------------------------------------------------------------

    def submit(
        self,
        request: JobRequest | Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> Document:
        """Submit a job, given whole or as keyword arguments, and return it.

        With `idempotency_key` a repeated call returns the first job.
        """
        document = request.to_json() if isinstance(request, JobRequest) else dict(request or {})
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return self._call("POST", "/v1/jobs", json={**document, **fields}, headers=headers)

    def get(self, job_id: str) -> Document:
        """Return a job whole."""
        return self._call("GET", f"/v1/jobs/{_segment(job_id)}")

    def list(self, states: Sequence[str] = (), page_size: int = 50) -> Iterator[Document]:
        """Yield the jobs, newest first; pages are fetched as they are needed."""
        before: str | None = None
        while True:
            query: dict[str, Any] = {"limit": page_size, "state": [*states]}
            if before is not None:
                query["before"] = before
            page = self._call("GET", "/v1/jobs", params=query)
            yield from page["jobs"]
            before = page["next"]
            if before is None:
                return

    def cancel(self, job_id: str) -> Document:
        """Cancel a job and return it; nothing happens when it was cancelled already."""
        return self._call("POST", f"/v1/jobs/{_segment(job_id)}/cancel")

    def retry(self, job_id: str) -> Document:
        """Open an ended job again for the variants that did not succeed, and return it."""
        return self._call("POST", f"/v1/jobs/{_segment(job_id)}/retry")

    def delete(self, job_id: str) -> None:
        """Forget an ended job with its artifacts and logs."""
        self._call("DELETE", f"/v1/jobs/{_segment(job_id)}")

    def compare(self, job_id: str) -> Document:
        """Return how a job's artifacts compare in size, quality, speed and memory, format by format."""
        return self._call("GET", f"/v1/jobs/{_segment(job_id)}/comparison")

    def pick(
        self,
        job_id: str,
        *,
        prefer: str | None = None,
        format: str | None = None,
        engine: str | None = None,
        **bounds: float,
    ) -> Document:
        """Return the best published artifact within `bounds` (gates, e.g. `max_size_bytes=1e9`), and why.

        `picked` is None when none fits; `nearest` then says what misses least.
        """
        query = {"prefer": prefer, "format": format, "engine": engine, **bounds}
        params = {name: value for name, value in query.items() if value is not None}
        return self._call("GET", f"/v1/jobs/{_segment(job_id)}/pick", params=params)

    def wait(self, job_id: str, on_event: OnEvent | None = None, after: int = 0) -> Document:
        """Wait until a job has ended and return it; `on_event` sees every event with a number above `after`."""
        for event in self.events(job_id, after):
            if on_event is not None:
                on_event(event)
        return self.get(job_id)

    def events(self, job_id: str, after: int = 0) -> Iterator[Document]:
        """Yield a job's events (`number`, `kind`, `data`, `created_at`) until it ends.

        A stream that breaks is taken up after the last event seen. Raises `ServiceUnavailable` after `patience_s`
        without one event or answer.
        """
        heard_at = time.monotonic()
        while True:
            try:
                for event in self._stream(f"/v1/jobs/{_segment(job_id)}/events", after):
                    heard_at = time.monotonic()
                    if event["kind"] == "end":
                        return
                    after = event["number"]
                    yield event
                    heard_at = time.monotonic()
            except EdgeKilnError as error:
                if not error.retryable or time.monotonic() - heard_at > self.patience_s:
                    raise
            time.sleep(_RECONNECT_S)

    def logs(self, job_id: str, kind: str | None = None, tail_bytes: int | None = None) -> Documents:
        """Return what the attempts of a job's steps wrote; `text` is the end of each."""
        query = {"kind": kind, "tail_bytes": tail_bytes}
        params = {name: value for name, value in query.items() if value is not None}
        logs: Documents = self._call("GET", f"/v1/jobs/{_segment(job_id)}/logs", params=params)["logs"]
        return logs

    def print_logs(self, job_id: str, kind: str | None = None) -> Iterator[str]:
        """Yield all logs of a job whole, as text, in pieces."""
        path = f"/v1/jobs/{_segment(job_id)}/logs"
        params = {} if kind is None else {"kind": kind}
        with self._stream_response(path, {"Accept": "text/plain"}, params) as response:
            yield from response.iter_text()

    def follow_logs(self, job_id: str, kind: str | None = None) -> Iterator[str]:
        """Yield what a job's steps print, as they print it, until the job has ended; what came too fast is left out."""
        seen: dict[tuple[str, int], int] = {}
        while True:
            # Read before the logs: what is printed until the end is then in them.
            is_final = self.get(job_id)["finalized_at"] is not None
            for entry in self.logs(job_id, kind, tail_bytes=_FOLLOWED_BYTES):
                yield from _describe_news(entry, seen)
            if is_final:
                return
            time.sleep(_FOLLOW_S)

    # --- uploads ---------------------------------------------------------------------------------

    def upload(self, path: Path | str) -> Document:
        """Store a file on the server and return it; a job names it by its `sha256`. The same bytes are stored once."""
        file = Path(path)
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            # A length, for a server that refuses what is too large before it is sent.
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(stream.tell())}
            stream.seek(0)
            stored = self._call(
                "POST", "/v1/uploads", content=stream, headers=headers, params={"name": file.name[:200]}
            )
        if stored["sha256"] != sha256:
            raise BlobCorrupt(f"{file} changed while it was uploaded, or on its way. Upload it again.", path=str(file))
        return stored

    def uploads(self, page_size: int = 50) -> Iterator[Document]:
        """Yield what was uploaded, newest first; pages are fetched as they are needed."""
        query: dict[str, Any] = {"limit": page_size}
        while True:
            page = self._call("GET", "/v1/uploads", params=query)
            yield from page["uploads"]
            if page["next"] is None:
                return
            query["before"] = page["next"]

    # --- schedules -------------------------------------------------------------------------------

    def add_schedule(
        self,
        name: str,
        job: JobRequest | Mapping[str, Any],
        *,
        cron: str | None = None,
        time_zone: str = "UTC",
        every_s: int | None = None,
        missed: str = "once",
        overlap: str = "skip",
    ) -> Document:
        """Submit a job at every tick from now on, and return the schedule.

        `cron` (five fields, by the clock of `time_zone`) or `every_s`; `missed`: `once` or `skip`; `overlap`: `skip`
        or `allow`.
        """
        timing = {"cron": cron, "time_zone": time_zone, "every_s": every_s}
        request = job.to_json() if isinstance(job, JobRequest) else dict(job)
        document = {"name": name, "job": request, "missed": missed, "overlap": overlap, **timing}
        return self._call("POST", "/v1/schedules", json=document)

    def schedules(self, page_size: int = 50) -> Iterator[Document]:
        """Yield the schedules with their last ticks, newest first; pages are fetched as they are needed."""
        query: dict[str, Any] = {"limit": page_size}
        while True:
            page = self._call("GET", "/v1/schedules", params=query)
            yield from page["schedules"]
            if page["next"] is None:
                return
            query["before"] = page["next"]

    def get_schedule(self, schedule_id: str) -> Document:
        """Return a schedule with its last ticks and the next ones."""
        return self._call("GET", f"/v1/schedules/{_segment(schedule_id)}")

    def pause_schedule(self, schedule_id: str) -> Document:
        """Let a schedule submit nothing until it is resumed, and return it."""
        return self._call("POST", f"/v1/schedules/{_segment(schedule_id)}/pause")

    def resume_schedule(self, schedule_id: str) -> Document:
        """Let a schedule go on with its next tick from now, and return it."""
        return self._call("POST", f"/v1/schedules/{_segment(schedule_id)}/resume")

    def remove_schedule(self, schedule_id: str) -> None:
        """Forget a schedule; its jobs stay."""
        self._call("DELETE", f"/v1/schedules/{_segment(schedule_id)}")

    # --- artifacts -------------------------------------------------------------------------------

    def artifacts(self, job_id: str) -> Documents:
        """Return what a job has published so far."""
        artifacts: Documents = self._call("GET", f"/v1/jobs/{_segment(job_id)}/artifacts")["artifacts"]
        return artifacts

    def download(
        self,
        what: str | Mapping[str, Any],
        folder: Path | str,
        on_bytes: Callable[[str, int, int], None] | None = None,
    ) -> tuple[Path, ...]:
        """Download a job's artifacts (by job id), or one artifact document, into `folder`; return the files' paths.

        Beside each file stands `NAME.manifest.json`. A file that is there with the right digest is kept, a partial
        one (`NAME.part`) is resumed, and no file appears before its SHA-256 is right. `on_bytes` sees name, bytes
        so far and size.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        artifacts = self.artifacts(what) if isinstance(what, str) else [dict(what)]
        paths = []
        for artifact in artifacts:
            paths.append(fetch_artifact(self._open, artifact, target, on_bytes))
            fetch_manifest(self._open, artifact, target)
        return tuple(paths)

    # --- the fleet, for operators ----------------------------------------------------------------

    def workers(self) -> Documents:
        """Return the workers that have not ended, with what each is running."""
        workers: Documents = self._call("GET", "/v1/workers")["workers"]
        return workers

    def drain_worker(self, worker_id: str) -> Document:
        """Let a worker claim nothing new and finish what it runs; return it."""
        return self._call("POST", f"/v1/workers/{_segment(worker_id)}/drain")

    def resume_worker(self, worker_id: str) -> Document:
        """Let a drained worker claim again; return it."""
        return self._call("POST", f"/v1/workers/{_segment(worker_id)}/resume")

    # --- the server ------------------------------------------------------------------------------

    def recipes(self) -> Document:
        """Return what a job may ask for: recipes, formats, engines, devices, gates."""
        return self._call("GET", "/v1/recipes")

    def health(self) -> Document:
        """Return what `/healthz` says: the server's process answers."""
        return self._call("GET", "/healthz")

    def readiness(self) -> Document:
        """Return the server's own checks, whether it is ready or not."""
        with _errors(self.url):
            response = self._http.get("/readyz")
        if response.headers.get("content-type", "").startswith("application/json"):
            return dict(response.json())
        raise _read_problem(response)

    # --- HTTP ------------------------------------------------------------------------------------

    def _call(self, method: str, path: str, **options: Any) -> Document:
        with _errors(self.url):
            response = self._http.request(method, path, **options)
        if not response.is_success:
            raise _read_problem(response)
        if response.status_code == httpx.codes.NO_CONTENT:
            return {}
        try:
            return dict(response.json())
        except ValueError as error:
            raise ServiceUnavailable(f"{self.url} answered with something that is not EdgeKiln's.") from error

    def _open(self, path: str, headers: Mapping[str, str]) -> _Stream:
        return self._stream_response(path, headers, {})

    def _stream_response(self, path: str, headers: Mapping[str, str], params: Mapping[str, Any]) -> _Stream:
        return _Stream(self._http, self.url, path, headers, params)

    def _stream(self, path: str, after: int) -> Iterator[Document]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        with self._stream_response(path, headers, {}) as response:
            yield from _parse_events(response.iter_lines())


class _Stream:
    """A streamed answer whose failures, at any point, are EdgeKiln's."""

    def __init__(
        self, http: httpx.Client, url: str, path: str, headers: Mapping[str, str], params: Mapping[str, Any]
    ) -> None:
        self._errors = _errors(url)
        # Bytes count as the server counts them only when nobody compresses them on the way.
        self._opening = http.stream("GET", path, headers={"Accept-Encoding": "identity", **headers}, params=params)

    def __enter__(self) -> httpx.Response:
        with self._errors:
            response = self._opening.__enter__()
            if response.is_success:
                return response
            response.read()
        self._opening.__exit__(None, None, None)
        raise _read_problem(response)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opening.__exit__(kind, error, trace)
        self._errors.__exit__(kind, error, trace)


class _errors:  # noqa: N801 - reads as a block
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


def _segment(identifier: str) -> str:
    """Return an id fit for a path: whoever types nonsense is told that there is no such job."""
    return quote(identifier, safe="") or "-"


def _describe_news(entry: Document, seen: dict[tuple[str, int], int]) -> Iterator[str]:
    """Yield what an attempt has printed beyond what was `seen` of it, and remember that."""
    attempt = (entry["step_id"], entry["attempt"])
    size_bytes, text = entry["size_bytes"] or 0, (entry["text"] or "").encode()
    if attempt not in seen:
        yield f"==> {entry['kind']} {entry['step_id']}, attempt {entry['attempt']}\n"
    new_bytes = size_bytes - seen.get(attempt, 0)
    seen[attempt] = max(size_bytes, seen.get(attempt, 0))
    if new_bytes > len(text):
        yield f"... {new_bytes - len(text)} bytes left out ...\n"
    if new_bytes > 0:
        yield text[-new_bytes:].decode(errors="replace")


def _parse_events(lines: Iterator[str]) -> Iterator[Document]:
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


def _read_problem(response: httpx.Response) -> EdgeKilnError:
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
