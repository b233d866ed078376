"""The SDK: the REST API as Python calls.

Owns the routes from the caller's side; streams and downloads are taken up where they broke off. How HTTP is spoken is
in `service.client_http`. Knows neither ledger nor store. Called by `service.cli` and by users' programs.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from service.client_http import (
    URL_VARIABLE,
    Body,
    PatientHttp,
    Stream,
    hand_on_trace,
    parse_events,
    read_problem,
    reported_errors,
)
from service.downloads import fetch_artifact, fetch_manifest, fetch_measurement, fetch_signature
from service.errors import BlobCorrupt, EdgeKilnError, InvalidSettings, ServiceUnavailable, UploadNotFound
from service.local_folder import read_folder
from service.requests import JobRequest
from service.sending import LargeFile, name_upload, send_file
from service.signing import Verifier

DEFAULT_URL = "http://127.0.0.1:8711"
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
#: Between two looks at logs that are followed, and how much of what is new in each is read at a look.
_FOLLOW_S = 1.0
_FOLLOWED_BYTES = 64 << 10
#: Logs that one request names.
_MAX_SINCE = 50
_CHUNK_BYTES = 1 << 20
#: Files up to this size are uploaded in one request.
_SMALL_BYTES = 16 << 20
#: How long the logs of steps that were running when a job ended are waited for.
_LAST_WORDS_S = 10.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Client:
    """A connection to one EdgeKiln server; use it as a context manager or call `close`.

    `url` and `api_key` default to `EDGEKILN_URL` and `EDGEKILN_API_KEY`. Methods raise the errors of
    `service.errors`: the server's own by their code, and `ServiceUnavailable` when it cannot be reached. Event
    streams are taken up again for `patience_s` seconds after the last event, and a request that came too often for the
    server is sent again when it says, within the same time.
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
        self._http = PatientHttp(
            patience_s=patience_s,
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
            # A proxy cannot reach this machine's loopback.
            trust_env=parts.hostname not in _LOOPBACK,
            transport=transport,
            event_hooks={"request": [hand_on_trace]},
        )

    @property
    def is_local(self) -> bool:
        """Whether the server is reached by this machine's loopback."""
        return urlsplit(self.url).hostname in _LOOPBACK

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
        files: Mapping[str, Path] | None = None,
        on_upload: Callable[[Path], object] | None = None,
        **fields: Any,
    ) -> Document:
        """Submit a job, given whole or as keyword arguments, and return it.

        With `idempotency_key` a repeated call returns the first job. `files` are files of this machine by digest: those
        that the request names and the server lacks are uploaded first, each shown to `on_upload`.
        """
        document = request.to_json() if isinstance(request, JobRequest) else dict(request or {})
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        asked = {"json": {**document, **fields}, "headers": headers}
        try:
            return self._call("POST", "/v1/jobs", **asked)
        except UploadNotFound as error:
            missing = [digest for digest in error.details.get("digests", ()) if digest in (files or {})]
            if not files or not missing:
                raise
        for digest in missing:
            if on_upload is not None:
                on_upload(files[digest])
            self.upload(files[digest])
        return self._call("POST", "/v1/jobs", **asked)

    def submit_folder(self, folder: Path | str, **options: Any) -> Document:
        """Submit a job on a checkpoint folder of this machine, of which the server gets what it lacks.

        `options` are those of `submit`. Raises `SourceNotFound`, `CheckpointInvalid` and `CheckpointUnsafe` too.
        """
        source, files = read_folder(Path(folder))
        return self.submit(source=source.model_dump(mode="json"), files=files, **options)

    def get(self, job_id: str) -> Document:
        """Return a job whole."""
        return self._call("GET", f"/v1/jobs/{_segment(job_id)}")

    def list(self, states: Sequence[str] = (), page_size: int = 50) -> Iterator[Document]:
        """Yield the jobs, newest first; pages are fetched as they are needed."""
        return self._read_pages("jobs", {"limit": page_size, "state": [*states]})

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
        return self._read_logs(job_id, kind=kind, tail_bytes=tail_bytes)

    def _read_logs(self, job_id: str, **query: Any) -> Documents:
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
        give_up_at: float | None = None
        while True:
            # Read before the logs: what is printed until the end is then in them.
            is_final = self.get(job_id)["finalized_at"] is not None
            entries = self.logs(job_id, kind, tail_bytes=0)
            news = [entry for entry in entries if (entry["size_bytes"] or 0) > seen.get(_attempt_of(entry), -1)]
            for first in range(0, len(news), _MAX_SINCE):
                since = [_name_since(entry, seen) for entry in news[first : first + _MAX_SINCE]]
                for entry in self._read_logs(job_id, tail_bytes=_FOLLOWED_BYTES, since=since):
                    yield from _describe_news(entry, seen)
            if is_final:
                give_up_at = give_up_at or time.monotonic() + _LAST_WORDS_S
                # A cancelled step's worker stores its log after the job has ended; a worker that vanished never does.
                if all(entry.get("is_complete", True) for entry in entries) or time.monotonic() > give_up_at:
                    return
            time.sleep(_FOLLOW_S)

    # --- uploads ---------------------------------------------------------------------------------

    def upload(self, path: Path | str, on_bytes: Callable[[str, int, int], None] | None = None) -> Document:
        """Store a file on the server and return it; a job names it by its `sha256`. The same bytes are stored once.

        A large file goes in pieces: an upload that breaks is taken up for `patience_s` seconds after the last byte, and
        by a later call. `on_bytes` sees name, bytes so far and size.
        """
        file = Path(path)
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            if stream.tell() > _SMALL_BYTES:
                return send_file(self._send, LargeFile(file, sha256, stream.tell()), self.patience_s, on_bytes)
            # A length, for a server that refuses what is too large before it is sent.
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(stream.tell())}
            stored = self._call(
                "POST", "/v1/uploads", content=Body(stream), headers=headers, params={"name": name_upload(file)}
            )
        if stored["sha256"] != sha256:
            raise BlobCorrupt(f"{file} changed while it was uploaded, or on its way. Upload it again.", path=str(file))
        return stored

    def uploads(self, page_size: int = 50) -> Iterator[Document]:
        """Yield what was uploaded, newest first; pages are fetched as they are needed."""
        return self._read_pages("uploads", {"limit": page_size})

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
        return self._read_pages("schedules", {"limit": page_size})

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
        *,
        verify_key: Path | str | None = None,
    ) -> tuple[Path, ...]:
        """Download a job's artifacts (by job id), or one artifact document, into `folder`; return the files' paths.

        Beside each file stand `NAME.manifest.json` and its measurements. A file that is there with the right digest is
        kept, a partial one (`NAME.part`) is resumed, and no file appears before its SHA-256 is right. `on_bytes` sees
        name, bytes so far and size. With `verify_key`, a public key in PEM, every artifact must be signed with its
        private half: raises `SignatureInvalid` before anything of it is downloaded.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        artifacts = self.artifacts(what) if isinstance(what, str) else [dict(what)]
        verifier = None if verify_key is None else Verifier(Path(verify_key))
        paths = []
        for artifact in artifacts:
            fetch_signature(self._open, artifact, target, verifier)
            paths.append(fetch_artifact(self._open, artifact, target, on_bytes))
            fetch_manifest(self._open, artifact, target)
            for measurement in self.measurements(artifact["id"]) if "measurements_url" in artifact else ():
                fetch_measurement(self._open, measurement, target)
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

    # --- keys of one's own tenant, for operators -------------------------------------------------

    def keys(self) -> Documents:
        """Return the tenant's API keys, without their secrets."""
        keys: Documents = self._call("GET", "/v1/keys")["keys"]
        return keys

    def create_key(
        self, name: str, scopes: Sequence[str] = ("read", "write"), expires_days: float | None = None
    ) -> Document:
        """Make an API key for the own tenant; `key` of what is returned is never shown again."""
        return self._call("POST", "/v1/keys", json={"name": name, "scopes": [*scopes], "expires_days": expires_days})

    def rotate_key(self, key_id: str, overlap_hours: float = 24.0) -> Document:
        """Make a key in place of another, which ends after the overlap; return the new one."""
        return self._call("POST", f"/v1/keys/{_segment(key_id)}/rotate", json={"overlap_hours": overlap_hours})

    def revoke_key(self, key_id: str) -> None:
        """End a key at once."""
        self._call("DELETE", f"/v1/keys/{_segment(key_id)}")

    # --- tokens for private sources --------------------------------------------------------------

    def tokens(self) -> Documents:
        """Return which tokens are stored, by fingerprint."""
        tokens: Documents = self._call("GET", "/v1/tokens")["tokens"]
        return tokens

    def set_token(self, token: str, kind: str = "hub") -> Document:
        """Store what private sources of a kind are read with, and return its fingerprint; it is never shown again."""
        stored = self._call("PUT", f"/v1/tokens/{_segment(kind)}", json={"token": token})["tokens"]
        return next(each for each in stored if each["kind"] == kind)

    def remove_token(self, kind: str = "hub") -> None:
        """Forget a token."""
        self._call("DELETE", f"/v1/tokens/{_segment(kind)}")

    # --- phones ----------------------------------------------------------------------------------

    def devices(self) -> Documents:
        """Return the phones that were ever attached: what each is, and how it is."""
        found: Documents = self._call("GET", "/v1/devices")["devices"]
        return found

    def tag_device(self, device_id: str, tags: Sequence[str]) -> Documents:
        """Give a phone tags in place of those it had, as an operator; return all phones."""
        found: Documents = self._call("PUT", f"/v1/devices/{_segment(device_id)}/tags", json={"tags": [*tags]})[
            "devices"
        ]
        return found

    def release_device(self, device_id: str) -> Documents:
        """Let a phone that was given up be used again, as an operator; return all phones."""
        found: Documents = self._call("POST", f"/v1/devices/{_segment(device_id)}/release")["devices"]
        return found

    def tools(self) -> Documents:
        """Return the tools that measure on phones."""
        found: Documents = self._call("GET", "/v1/tools")["tools"]
        return found

    def add_tool(self, name: str, version: str, abi: str, files: Mapping[str, Path]) -> Documents:
        """Upload a tool's files (name on the phone -> file here) and register it, as an operator; return all tools."""
        found: Documents = self._add_tool(name, version, abi, files, rebenchmark=False)["tools"]
        return found

    def rebenchmark(self, name: str, version: str, abi: str, files: Mapping[str, Path]) -> Document:
        """Do the same as `add_tool`, and measure with it what older versions have measured, on the same phones.

        Returns how many benchmarks were `started`, `known` already, `away` with their phones, and `refused` by quotas.
        """
        found: Document = self._add_tool(name, version, abi, files, rebenchmark=True)["rebenchmarks"]
        return found

    def _add_tool(self, name: str, version: str, abi: str, files: Mapping[str, Path], *, rebenchmark: bool) -> Document:
        digests = {file: self.upload(path)["sha256"] for file, path in files.items()}
        document = {"name": name, "version": version, "abi": abi, "files": digests, "rebenchmark": rebenchmark}
        return self._call("POST", "/v1/tools", json=document)

    def benchmark(
        self,
        artifact_id: str,
        devices: Sequence[str],
        *,
        idempotency_key: str | None = None,
        **how: Any,
    ) -> Document:
        """Measure a published artifact on devices (`host`, `any`, `all`, or conditions) and return the job that does.

        `how`: `backends`, `threads`, `smoke_prompts`, `profile`, `priority`, as in a job's request. What is found is
        among the artifact's `measurements`. With `idempotency_key` a repeated call returns the first job.
        """
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        path = f"/v1/artifacts/{_segment(artifact_id)}/benchmarks"
        return self._call("POST", path, json={"devices": [*devices], **how}, headers=headers)

    def fit(self, artifact_id: str, device: str | None = None, backend: str = "cpu") -> Document:
        """Return what an artifact will take on phones (`devices`), as far as measurements bear it."""
        query = {"backend": backend, **({"device": device} if device else {})}
        return self._call("GET", f"/v1/artifacts/{_segment(artifact_id)}/fit", params=query)

    def measurements(self, artifact_id: str) -> Documents:
        """Return what was measured of an artifact, each with the `url` of its whole document."""
        path = f"/v1/artifacts/{_segment(artifact_id)}/measurements"
        found: Documents = self._call("GET", path)["measurements"]
        return found

    def history(
        self,
        *,
        model: str | None = None,
        variant: str | None = None,
        format: str | None = None,
        device: str | None = None,
        limit: int = 50,
    ) -> Documents:
        """Return the newest measurements of all jobs that fit, oldest first."""
        query = {"model": model, "variant": variant, "format": format, "device": device, "limit": limit}
        params = {name: value for name, value in query.items() if value is not None}
        found: Documents = self._call("GET", "/v1/measurements", params=params)["measurements"]
        return found

    def difference(self, baseline: str, candidate: str) -> Document:
        """Return what became of each metric from one measurement to another, by their ids in the history."""
        return self._call("GET", "/v1/measurements/difference", params={"baseline": baseline, "candidate": candidate})

    # --- the server ------------------------------------------------------------------------------

    def recipes(self) -> Document:
        """Return what a job may ask for: recipes, formats, engines, devices, gates."""
        return self._call("GET", "/v1/recipes")

    def health(self) -> Document:
        """Return what `/healthz` says: the server's process answers."""
        return self._call("GET", "/healthz")

    def readiness(self) -> Document:
        """Return the server's own checks, whether it is ready or not."""
        with reported_errors(self.url):
            response = self._http.get("/readyz")
        if response.headers.get("content-type", "").startswith("application/json"):
            return dict(response.json())
        raise read_problem(response)

    # --- HTTP ------------------------------------------------------------------------------------

    def _call(self, method: str, path: str, **options: Any) -> Document:
        response = self._send(method, path, **options)
        if response.status_code == httpx.codes.NO_CONTENT:
            return {}
        try:
            return dict(response.json())
        except ValueError as error:
            raise ServiceUnavailable(f"{self.url} answered with something that is not EdgeKiln's.") from error

    def _send(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        content: Any = None,
        **options: Any,
    ) -> httpx.Response:
        with reported_errors(self.url):
            response = self._http.request(method, path, headers=headers, content=content, **options)
        if not response.is_success:
            raise read_problem(response)
        return response

    def _read_pages(self, what: str, query: dict[str, Any]) -> Iterator[Document]:
        """Yield what `GET /v1/WHAT` lists under its own name, page after page."""
        while True:
            page = self._call("GET", f"/v1/{what}", params=query)
            yield from page[what]
            if page["next"] is None:
                return
            query = {**query, "before": page["next"]}

    def _open(self, path: str, headers: Mapping[str, str]) -> Stream:
        return self._stream_response(path, headers, {})

    def _stream_response(self, path: str, headers: Mapping[str, str], params: Mapping[str, Any]) -> Stream:
        return Stream(self._http, self.url, path, headers, params)

    def _stream(self, path: str, after: int) -> Iterator[Document]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        with self._stream_response(path, headers, {}) as response:
            yield from parse_events(response.iter_lines())


def _segment(identifier: str) -> str:
    """Return an id fit for a path: whoever types nonsense is told that there is no such job."""
    return quote(identifier, safe="") or "-"


def _attempt_of(entry: Document) -> tuple[str, int]:
    return entry["step_id"], entry["attempt"]


def _name_since(entry: Document, seen: dict[tuple[str, int], int]) -> str:
    step_id, attempt = _attempt_of(entry)
    return f"{step_id}:{attempt}:{seen.get((step_id, attempt), 0)}"


def _describe_news(entry: Document, seen: dict[tuple[str, int], int]) -> Iterator[str]:
    """Yield what an attempt has printed beyond what was `seen` of it, and remember that."""
    attempt = _attempt_of(entry)
    size_bytes, text = entry["size_bytes"] or 0, (entry["text"] or "").encode()
    if attempt not in seen:
        yield f"==> {entry['kind']} {entry['step_id']}, attempt {entry['attempt']}\n"
    new_bytes = size_bytes - seen.get(attempt, 0)
    seen[attempt] = max(size_bytes, seen.get(attempt, 0))
    if new_bytes > len(text):
        yield f"... {new_bytes - len(text)} bytes left out ...\n"
    if new_bytes > 0:
        yield text[-new_bytes:].decode(errors="replace")
