"""The SDK against scripted servers: errors, pages, streams and downloads that break off. No sockets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import client as client_module
from service import downloads
from service.client import Client
from service.errors import (
    BlobCorrupt,
    IdempotencyMismatch,
    InvalidRequest,
    InvalidSettings,
    NotFound,
    RemoteError,
    ServiceUnavailable,
)
from service.requests import parse_request

DATA = b"weights" * 1000
DIGEST = hashlib.sha256(DATA).hexdigest()
MANIFEST = b'{"artifact":{}}'
ARTIFACT = {
    "id": "art_1",
    "name": "tiny-none.tflite",
    "sha256": DIGEST,
    "size_bytes": len(DATA),
    "url": "/v1/artifacts/art_1",
    "manifest_url": "/v1/artifacts/art_1/manifest",
    "manifest_sha256": hashlib.sha256(MANIFEST).hexdigest(),
}
Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_RECONNECT_S", 0.0)
    monkeypatch.setattr(downloads, "_PAUSE_S", 0.0)


def connect(handler: Handler, **options: Any) -> Client:
    return Client("http://kiln.example", transport=httpx.MockTransport(handler), **options)


def problem(status: int, code: str, **details: Any) -> httpx.Response:
    document = {"code": code, "detail": "A sentence.", "retryable": False, "details": details, "status": status}
    return httpx.Response(status, content=json.dumps(document), headers={"Content-Type": "application/problem+json"})


class Broken(httpx.SyncByteStream):
    """Sends some bytes, then breaks off."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __iter__(self) -> Iterator[bytes]:
        yield self.data
        raise httpx.RemoteProtocolError("peer closed connection")


# --- calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "not_found", NotFound),
        (409, "idempotency_mismatch", IdempotencyMismatch),
        (422, "invalid_request", InvalidRequest),
    ],
)
def test_a_problem_is_the_error_it_tells_of(status: int, code: str, kind: type[Exception]) -> None:
    with connect(lambda _: problem(status, code, job_id="job_1")) as client, pytest.raises(kind) as caught:
        client.get("job_1")
    assert str(caught.value) == "A sentence."
    assert caught.value.details == {"job_id": "job_1"}  # type: ignore[attr-defined]


def test_a_problem_of_a_newer_server_keeps_its_code() -> None:
    with connect(lambda _: problem(418, "teapot")) as client, pytest.raises(RemoteError) as caught:
        client.get("job_1")
    assert caught.value.remote_code == "teapot"


def test_an_answer_of_some_other_server_is_named_as_such() -> None:
    with (
        connect(lambda _: httpx.Response(502, text="<html>")) as client,
        pytest.raises(ServiceUnavailable, match="502"),
    ):
        client.get("job_1")
    with connect(lambda _: httpx.Response(200, text="<html>")) as client, pytest.raises(ServiceUnavailable):
        client.get("job_1")


def test_a_server_that_is_away_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with connect(refuse) as client, pytest.raises(ServiceUnavailable, match="edgekiln up"):
        client.get("job_1")


@pytest.mark.parametrize("url", ["kiln.example", "ftp://kiln.example", "http://", "http:///x"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InvalidSettings, match="URL"):
        Client(url)


def test_url_and_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKILN_URL", "http://elsewhere.example:9/")
    monkeypatch.setenv("EDGEKILN_API_KEY", "ek_secret")
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={})

    with Client(transport=httpx.MockTransport(answer)) as client:
        client.get("a/../b")
    assert str(seen[0].url) == "http://elsewhere.example:9/v1/jobs/a%2F..%2Fb"
    assert seen[0].headers["authorization"] == "Bearer ek_secret"


def test_a_request_may_be_a_model_a_document_or_keywords() -> None:
    bodies: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        assert request.headers.get("idempotency-key") == "once"
        return httpx.Response(201, json={"id": "job_1"})

    source = {"kind": "hub", "repo": "owner/name"}
    with connect(answer) as client:
        client.submit(parse_request({"source": source, "recipes": ["none"]}), idempotency_key="once")
        client.submit({"source": source}, idempotency_key="once", recipes=["none"])
        client.submit(source=source, recipes=["none"], idempotency_key="once")
    assert bodies[0]["source"] == {**source, "revision": None}
    assert bodies[1] == bodies[2] == {"source": source, "recipes": ["none"]}


def test_pages_are_fetched_as_they_are_needed() -> None:
    asked: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        before = request.url.params.get("before")
        asked.append(before)
        assert request.url.params.get_list("state") == ["failed", "partial"]
        start = int(before or 0)
        return httpx.Response(
            200,
            json={
                "jobs": [{"id": str(start + 1)}, {"id": str(start + 2)}],
                "next": str(start + 2) if start < 4 else None,
            },
        )

    with connect(answer) as client:
        jobs = client.list(["failed", "partial"], page_size=2)
        assert next(jobs)["id"] == "1"
        assert asked == [None]
        assert [job["id"] for job in jobs] == ["2", "3", "4", "5", "6"]
    assert asked == [None, "2", "4"]


# --- events ---------------------------------------------------------------------------------------


def block(number: int, kind: str = "step") -> bytes:
    return (
        f'id: {number}\nevent: {kind}\ndata: {{"n": {number}, "created_at": "2026-01-01T00:00:00+00:00"}}\n\n'.encode()
    )


def test_a_stream_that_breaks_is_taken_up_after_the_last_event() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers["last-event-id"])
        if len(asked) == 1:
            return httpx.Response(
                200, stream=Broken(b"retry: 1000\n\n" + block(3) + b": still here\n\n" + block(4) + b"id: 5\n")
            )
        if len(asked) == 2:
            return problem_unavailable()
        return httpx.Response(200, content=block(5) + b"event: end\ndata: {}\n\n")

    with connect(answer) as client:
        events = list(client.events("job_1", after=2))
    assert [event["number"] for event in events] == [3, 4, 5]
    assert events[0] == {"number": 3, "kind": "step", "data": {"n": 3}, "created_at": "2026-01-01T00:00:00+00:00"}
    assert asked == ["2", "4", "4"]


def problem_unavailable() -> httpx.Response:
    return httpx.Response(
        503, json={"code": "service_unavailable", "detail": "Soon.", "retryable": True, "details": {}}
    )


def test_a_stream_of_no_job_is_not_tried_again() -> None:
    calls = []

    def answer(_request: httpx.Request) -> httpx.Response:
        calls.append(1)
        return problem(404, "not_found")

    with connect(answer) as client, pytest.raises(NotFound):
        list(client.events("job_1"))
    assert len(calls) == 1


def test_a_server_that_never_comes_back_is_given_up() -> None:
    with connect(lambda _: problem_unavailable(), patience_s=0.0) as client, pytest.raises(ServiceUnavailable):
        list(client.events("job_1"))


def test_waiting_shows_every_event_and_returns_the_job() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/events"):
            return httpx.Response(200, content=block(1) + block(2) + b"event: end\ndata: {}\n\n")
        return httpx.Response(200, json={"id": "job_1", "state": "succeeded"})

    seen: list[int] = []
    with connect(answer) as client:
        job = client.wait("job_1", lambda event: seen.append(event["number"]))
    assert (job["state"], seen) == ("succeeded", [1, 2])


# --- downloads ------------------------------------------------------------------------------------


class Shelf:
    """Serves one artifact by ranges, badly if told to."""

    def __init__(self, data: bytes = DATA, manifest: bytes = MANIFEST) -> None:
        self.data = data
        self.manifest = manifest
        self.ranges: list[str | None] = []
        #: Bytes after which each answer breaks off.
        self.breaks: list[int] = []
        self.knows_ranges = True

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/manifest"):
            return httpx.Response(200, content=self.manifest)
        if request.url.path.endswith("/artifacts"):
            return httpx.Response(200, json={"artifacts": [ARTIFACT]})
        asked = request.headers.get("range")
        self.ranges.append(asked)
        start = 0
        if asked and self.knows_ranges:
            assert request.headers["if-range"] == f'"{DIGEST}"'
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        rest = self.data[start:]
        status = 206 if start else 200
        if self.breaks:
            return httpx.Response(status, stream=Broken(rest[: self.breaks.pop(0)]))
        return httpx.Response(status, content=rest)


def test_a_download_brings_file_and_manifest_and_nothing_else(tmp_path: Path) -> None:
    with connect(Shelf()) as client:
        (path,) = client.download("job_1", tmp_path / "out")
    assert path.read_bytes() == DATA
    assert path.with_name("tiny-none.tflite.manifest.json").read_bytes() == MANIFEST
    assert sorted(entry.name for entry in path.parent.iterdir()) == [
        "tiny-none.tflite",
        "tiny-none.tflite.manifest.json",
    ]


def test_a_broken_download_goes_on_where_it_stopped(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.breaks = [100, 50, 200]
    sizes: list[int] = []
    with connect(shelf) as client:
        (path,) = client.download(ARTIFACT, tmp_path, lambda _name, done, _size: sizes.append(done))
    assert path.read_bytes() == DATA
    assert shelf.ranges == [None, "bytes=100-", "bytes=150-", "bytes=350-"]
    assert sizes == sorted(sizes)
    assert sizes[-1] == len(DATA)


def test_a_partial_file_of_an_earlier_run_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "tiny-none.tflite.part").write_bytes(DATA[:500])
    shelf = Shelf()
    with connect(shelf) as client:
        client.download(ARTIFACT, tmp_path)
    assert shelf.ranges == ["bytes=500-"]


def test_a_partial_file_that_is_whole_needs_no_bytes(tmp_path: Path) -> None:
    (tmp_path / "tiny-none.tflite.part").write_bytes(DATA)
    shelf = Shelf()
    with connect(shelf) as client:
        (path,) = client.download(ARTIFACT, tmp_path)
    assert (path.read_bytes(), shelf.ranges) == (DATA, [])


@pytest.mark.parametrize("partial", [b"garbage" * 10, DATA + b"more"])
def test_a_partial_file_of_something_else_is_fetched_anew(tmp_path: Path, partial: bytes) -> None:
    (tmp_path / "tiny-none.tflite.part").write_bytes(partial)
    with connect(Shelf()) as client:
        (path,) = client.download(ARTIFACT, tmp_path)
    assert path.read_bytes() == DATA


def test_a_server_without_ranges_is_taken_at_its_word(tmp_path: Path) -> None:
    (tmp_path / "tiny-none.tflite.part").write_bytes(DATA[:500])
    shelf = Shelf()
    shelf.knows_ranges = False
    with connect(shelf) as client:
        (path,) = client.download(ARTIFACT, tmp_path)
    assert path.read_bytes() == DATA


def test_a_file_that_is_there_and_right_is_kept(tmp_path: Path) -> None:
    (tmp_path / "tiny-none.tflite").write_bytes(DATA)
    shelf = Shelf()
    with connect(shelf) as client:
        client.download(ARTIFACT, tmp_path)
    assert shelf.ranges == []


def test_a_file_that_is_there_and_wrong_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "tiny-none.tflite").write_bytes(b"old")
    with connect(Shelf()) as client:
        (path,) = client.download(ARTIFACT, tmp_path)
    assert path.read_bytes() == DATA


def test_wrong_bytes_never_become_the_file(tmp_path: Path) -> None:
    with connect(Shelf(data=DATA[:-1] + b"X")) as client, pytest.raises(BlobCorrupt, match="SHA-256"):
        client.download(ARTIFACT, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_manifest_never_becomes_the_file(tmp_path: Path) -> None:
    with connect(Shelf(manifest=b"{}")) as client, pytest.raises(BlobCorrupt, match="manifest"):
        client.download(ARTIFACT, tmp_path)
    assert not (tmp_path / "tiny-none.tflite.manifest.json").exists()


def test_a_server_that_sends_no_more_is_given_up_and_the_part_is_kept(tmp_path: Path) -> None:
    with connect(Shelf(data=DATA[:900])) as client, pytest.raises(ServiceUnavailable):
        client.download(ARTIFACT, tmp_path)
    assert [(entry.name, entry.stat().st_size) for entry in tmp_path.iterdir()] == [("tiny-none.tflite.part", 900)]


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/b", "..", ".bashrc", "a\\b", "", "new\nline"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with connect(Shelf()) as client, pytest.raises(InvalidRequest):
        client.download({**ARTIFACT, "name": name}, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
