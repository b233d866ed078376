"""Uploads in pieces: whatever breaks on the way, the file is stored once, whole, and seen by its tenant alone."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.testclient import TestClient

from service.api import schemas
from service.client import Client
from service.errors import BlobCorrupt, PayloadTooLarge, QuotaExceeded
from service.ledger import access, quotas, sweep
from service.settings import Settings
from service.storage import blob_key
from service.sweep import Finding, sweep_store
from tests.api_world import World
from tests.kiln import wait_for

PATH = "/v1/uploads/resumable"
TUS = {"Tus-Resumable": "1.0.0"}
DATA = random.Random(6).randbytes(300_000)
DIGEST = hashlib.sha256(DATA).hexdigest()
#: More than the client sends in one request by itself, and more than two parts.
LARGE = random.Random(7).randbytes(35 << 20)
LARGE_DIGEST = hashlib.sha256(LARGE).hexdigest()


def encode(**metadata: str) -> str:
    return ",".join(f"{name} {base64.b64encode(value.encode()).decode()}" for name, value in metadata.items())


def begin(http: httpx.Client, size_bytes: int = len(DATA), key: str | None = None, **metadata: str) -> str:
    headers = {**TUS, "Upload-Length": str(size_bytes), "Upload-Metadata": encode(**metadata)}
    answer = http.post(PATH, headers=headers | authorize(key))
    assert answer.status_code == 201, answer.text
    return answer.headers["Location"]


def authorize(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def append(http: httpx.Client, path: str, offset: int, body: Any, key: str | None = None) -> httpx.Response:
    headers = {**TUS, "Upload-Offset": str(offset), "Content-Type": "application/offset+octet-stream"}
    return http.patch(path, headers=headers | authorize(key), content=body)


def ask(http: httpx.Client, path: str) -> int:
    answer = http.head(path, headers=TUS)
    assert (answer.status_code, answer.headers["Tus-Resumable"]) == (200, "1.0.0")
    return int(answer.headers["Upload-Offset"])


def await_end(http: httpx.Client, path: str, key: str | None = None) -> dict[str, Any]:
    def read() -> dict[str, Any] | None:
        document: dict[str, Any] = http.get(path, headers=authorize(key)).json()
        return document if document["state"] in ("stored", "failed") else None

    document = wait_for(read, "the upload has ended")
    schemas.ResumableDocument.model_validate(document)
    return document


def send(http: httpx.Client, data: bytes, key: str | None = None) -> dict[str, Any]:
    path = begin(http, len(data), key)
    assert append(http, path, 0, data, key).status_code == 204
    return await_end(http, path, key)


def test_a_file_in_two_pieces_is_stored_whole(world: World, http: TestClient) -> None:
    path = begin(http, filename="text.txt", sha256=DIGEST)
    assert ask(http, path) == 0
    half = append(http, path, 0, DATA[:100_000])
    assert (half.status_code, half.headers["Upload-Offset"]) == (204, "100000")
    assert "Upload-Expires" in half.headers
    assert [item["state"] for item in http.get(PATH).json()["uploads"]] == ["receiving"]
    assert http.get("/v1/uploads").json()["uploads"] == []
    assert append(http, path, 100_000, DATA[100_000:]).status_code == 204
    document = await_end(http, path)
    assert (document["state"], document["upload"]["sha256"], document["upload"]["name"]) == (
        "stored",
        DIGEST,
        "text.txt",
    )
    assert [item["sha256"] for item in http.get("/v1/uploads").json()["uploads"]] == [DIGEST]
    assert http.get(PATH).json() == {"uploads": []}
    with world.store.open(blob_key(DIGEST)) as chunks:
        assert b"".join(chunks) == DATA
    assert list((world.settings.cache_dir / "uploads").iterdir()) == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Tus-Resumable": "0.2.0", "Upload-Length": "5"}, 412),
        ({"Upload-Length": "5"}, 412),
        (TUS, 422),
        ({**TUS, "Upload-Length": "0"}, 422),
        ({**TUS, "Upload-Length": "-1"}, 422),
        ({**TUS, "Upload-Length": "1001"}, 413),
        ({**TUS, "Upload-Length": "5", "Upload-Metadata": "filename ###"}, 422),
        ({**TUS, "Upload-Length": "5", "Upload-Metadata": encode(sha256="abc")}, 422),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_a_byte(world: World, headers: dict[str, str], status: int) -> None:
    with world.http(max_resumable_bytes=1000) as http:
        assert http.post(PATH, headers=headers).status_code == status
        assert http.get(PATH).json() == {"uploads": []}
        begin(http, 1000)


@pytest.mark.parametrize(
    ("offset", "body", "headers", "status"),
    [
        (1, b"x", {}, 409),
        (0, DATA + b"x", {}, 413),
        (0, iter([DATA, b"x"]), {}, 413),
        (0, b"x", {"Content-Type": "application/octet-stream"}, 415),
        (0, b"x", {"Tus-Resumable": "2"}, 412),
        (-1, b"x", {}, 422),
    ],
    ids=["another offset", "too long", "too long, unannounced", "another type", "another version", "no offset"],
)
def test_pieces_that_do_not_fit_are_refused(
    http: TestClient, offset: int, body: Any, headers: dict[str, str], status: int
) -> None:
    path = begin(http)
    usual = {**TUS, "Upload-Offset": str(offset), "Content-Type": "application/offset+octet-stream"}
    assert http.patch(path, headers=usual | headers, content=body).status_code == status
    assert ask(http, path) == 0
    assert append(http, path, 0, DATA).status_code == 204, "control"


def test_other_tenants_see_nothing_of_it(world: World, http: TestClient) -> None:
    access.ensure_tenant(world.database, "other")
    key = access.create_key(world.database, "other", "test").secret
    path = begin(http)
    for method in ("HEAD", "GET", "DELETE", "PATCH"):
        headers = {**TUS, "Upload-Offset": "0", "Content-Type": "application/offset+octet-stream", **authorize(key)}
        assert http.request(method, path, headers=headers).status_code == 404
    assert http.get(PATH, headers=authorize(key)).json() == {"uploads": []}
    assert ask(http, path) == 0, "control"


def test_a_file_that_is_not_what_was_announced_fails(world: World, http: TestClient) -> None:
    path = begin(http, sha256="0" * 64)
    append(http, path, 0, DATA)
    document = await_end(http, path)
    assert (document["state"], document["upload"], document["error"]["code"]) == ("failed", None, "blob_corrupt")
    assert http.get("/v1/uploads").json()["uploads"] == []
    assert append(http, path, len(DATA), b"").status_code == 204


def test_a_broken_connection_loses_nothing_that_arrived_and_any_replica_goes_on(world: World) -> None:
    with world.server() as url, httpx.Client(base_url=url) as http:
        path = begin(http)
        with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as connection:
            head = f"PATCH {path} HTTP/1.1\r\nHost: localhost\r\nTus-Resumable: 1.0.0\r\nUpload-Offset: 0\r\n"
            head += f"Content-Type: application/offset+octet-stream\r\nContent-Length: {len(DATA)}\r\n\r\n"
            connection.sendall(head.encode() + DATA[:200_000])
        arrived = wait_for(lambda: ask(http, path) or None, "what had arrived is stored")
        assert 0 < arrived <= 200_000
    with world.server() as url, httpx.Client(base_url=url) as http:
        assert append(http, path, arrived, DATA[arrived:]).status_code == 204
        assert await_end(http, path)["upload"]["sha256"] == DIGEST


def test_of_two_that_send_the_same_piece_one_goes_on(world: World) -> None:
    both = threading.Barrier(2, timeout=30)

    def body() -> Iterator[bytes]:
        yield DATA[:1000]
        # The server has let both begin.
        both.wait()
        yield DATA[1000:]

    with world.server() as url, httpx.Client(base_url=url) as http:
        path = begin(http)
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda _: append(http, path, 0, body()).status_code, range(2)))
        assert sorted(answers) == [204, 409]
        assert await_end(http, path)["upload"]["sha256"] == DIGEST


def test_an_upload_whose_server_died_at_the_end_is_made_by_another(world: World) -> None:
    app = world.app()
    with TestClient(app, base_url="http://127.0.0.1:8711") as http:
        app.state.assembler.close()
        path = begin(http)
        assert append(http, path, 0, DATA).status_code == 204
        assert http.get(path).json()["state"] == "assembling", "nobody does it here"
    with world.http() as http:
        assert await_end(http, path)["upload"]["sha256"] == DIGEST


def test_room_is_found_before_bytes_are_taken(world: World, http: TestClient) -> None:
    quotas.set_quotas(world.database, "default", {"stored_bytes": 400_000})
    path = begin(http)
    headers = {**TUS, "Upload-Length": "100001"}
    refused = http.post(PATH, headers=headers)
    assert (refused.status_code, refused.json()["details"]["used"]) == (429, 300_000), "announced bytes count"
    append(http, path, 0, DATA)
    await_end(http, path)
    assert http.post(PATH, headers=headers).status_code == 429, "stored ones too, once"
    begin(http, 100_000)


@pytest.mark.parametrize(("damaged", "state"), [(1, "stored"), (1000, "failed")])
def test_a_part_that_is_damaged_on_its_way_is_read_again(
    world: World, http: TestClient, monkeypatch: pytest.MonkeyPatch, damaged: int, state: str
) -> None:
    """One that stays so fails the upload, after a bounded number of reads."""
    monkeypatch.setattr("service.api.assembly._READ_PAUSE_S", 0)
    read = world.store.open
    reads: list[str] = []

    @contextmanager
    def open_damaged(key: str) -> Iterator[Iterator[bytes]]:
        with read(key) as chunks:
            data = b"".join(chunks)
            reads.append(key)
            yield iter([data[:-1] + b"!" if len(reads) <= damaged else data])

    path = begin(http, sha256=DIGEST)
    append(http, path, 0, DATA[:1000])
    monkeypatch.setattr(world.store, "open", open_damaged)
    append(http, path, 1000, DATA[1000:])
    document = await_end(http, path)
    assert document["state"] == state
    assert len(reads) == (3 if state == "stored" else 4)
    if state == "failed":
        assert document["error"]["code"] == "blob_corrupt"


def test_unfinished_uploads_are_few(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.ledger.resumable.MAX_UNFINISHED", 2)
    paths = [begin(http), begin(http)]
    assert http.post(PATH, headers={**TUS, "Upload-Length": "1"}).status_code == 429
    assert http.delete(paths[0], headers=TUS).status_code == 204
    begin(http)


def test_pieces_of_an_upload_are_not_without_number(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.ledger.resumable.MAX_PARTS", 2)
    path = begin(http)
    assert [append(http, path, at, DATA[at : at + 1]).status_code for at in range(3)] == [204, 204, 409]


def sweep_now(world: World, *, dry_run: bool = False) -> list[Finding]:
    retention = sweep.Retention(0, math.inf, math.inf, math.inf, 0)
    return list(sweep_store(world.database, world.store, retention, dry_run=dry_run))


@pytest.mark.parametrize("has_expired", [True, False])
def test_what_nobody_goes_on_with_is_swept(world: World, has_expired: bool) -> None:
    part = hashlib.sha256(DATA[:1000]).hexdigest()
    with world.http(keep_unfinished_uploads_s=1e-3 if has_expired else 3600) as other, world.http() as http:
        path = begin(http)
        # Each piece says anew how long the next is waited for.
        assert append(other, path, 0, DATA[:1000]).status_code in (204, 404)
        gone = wait_for(lambda: [http.head(path, headers=TUS).status_code], "an answer") == [404]
        assert gone == has_expired
        promised = [finding.digest for finding in sweep_now(world, dry_run=True)]
        condemned = [finding.digest for finding in sweep_now(world)]
        assert promised == condemned == ([part] if has_expired else [])
        sweep_now(world)
        assert [found.key for found in world.store.list("blobs/")] == ([] if has_expired else [blob_key(part)])


def test_parts_go_once_the_whole_is_there(world: World, http: TestClient) -> None:
    path = begin(http)
    append(http, path, 0, DATA[:1000])
    append(http, path, 1000, DATA[1000:])
    await_end(http, path)
    sweep_now(world)
    sweep_now(world)
    assert [found.key for found in world.store.list("blobs/")] == [blob_key(DIGEST)]


def written_at(world: World) -> int:
    return (world.settings.data_dir / "store" / blob_key(DIGEST)).stat().st_mtime_ns


def test_bytes_that_another_tenant_has_take_the_same_way(world: World, http: TestClient, tmp_path: Path) -> None:
    """How long an upload takes must not tell whose they are: they are written whether they are there or not."""
    access.ensure_tenant(world.database, "other")
    key = access.create_key(world.database, "other", "test").secret
    assert send(http, DATA)["state"] == "stored"
    ways: list[Callable[[], Any]] = [
        lambda: http.post("/v1/uploads", content=DATA, headers=authorize(key)),
        lambda: send(http, DATA, key),
    ]
    for upload in ways:
        before = written_at(world)
        # What this tenant has had before is its own to know.
        upload()
        assert written_at(world) != before
    source = tmp_path / "source"
    source.write_bytes(DATA)
    before = written_at(world)
    world.store.put_file(blob_key(DIGEST), source, DIGEST)
    assert written_at(world) == before, "control: steps' outputs are left where they are"


def test_bytes_that_were_about_to_be_swept_are_stored_once_all_the_same(
    world: World, http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert http.post("/v1/uploads", content=DATA).status_code == 201
    with world.database.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM uploads")
    assert [finding.fate for finding in sweep_now(world)] == ["condemned"]
    stored: list[str] = []
    put_file = world.store.put_file
    monkeypatch.setattr(
        world.store, "put_file", lambda key, *rest, **options: (stored.append(key), put_file(key, *rest, **options))
    )
    assert http.post("/v1/uploads", content=DATA).status_code == 201
    assert stored == [blob_key(DIGEST)]


# --- the client ---------------------------------------------------------------------------------


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(LARGE)
    return path


def test_the_client_sends_a_large_file_in_pieces_and_tells_how_far_it_is(
    world: World, large_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.sending._PIECE_BYTES", 20 << 20)
    seen: list[int] = []
    with world.server() as url, Client(url) as kiln:
        stored = kiln.upload(large_file, lambda name, done, size: seen.append(done))
        assert (stored["sha256"], stored["name"]) == (LARGE_DIGEST, "model.safetensors")
        assert seen == sorted(seen)
        assert seen[-1] == len(LARGE)


def test_a_later_call_goes_on_where_an_earlier_one_ended(world: World, large_file: Path) -> None:
    seen: list[int] = []

    class Interrupted(Exception):
        pass

    def interrupt(name: str, done: int, size: int) -> None:
        if done > 20 << 20:
            raise Interrupted

    with world.server() as url, Client(url) as kiln, httpx.Client(base_url=url) as http:
        with pytest.raises(Interrupted):
            kiln.upload(large_file, interrupt)
        (path,) = [f"{PATH}/{item['id']}" for item in http.get(PATH).json()["uploads"]]
        wait_for(lambda: ask(http, path) >= 16 << 20, "what had arrived is stored")
        kiln.upload(large_file, lambda name, done, size: seen.append(done))
        assert seen[0] > 16 << 20
        assert http.get(PATH).json() == {"uploads": []}


def test_a_refusal_is_not_tried_again(world: World, large_file: Path) -> None:
    with world.server(max_resumable_bytes=len(LARGE) - 1) as url, Client(url) as kiln:
        with pytest.raises(PayloadTooLarge):
            kiln.upload(large_file)
    quotas.set_quotas(world.database, "default", {"stored_bytes": 1000})
    with world.server() as url, Client(url) as kiln:
        with pytest.raises(QuotaExceeded):
            kiln.upload(large_file)


def test_a_file_that_changes_meanwhile_is_not_stored(world: World, large_file: Path) -> None:
    def change(name: str, done: int, size: int) -> None:
        with large_file.open("r+b") as stream:
            stream.seek(-10, os.SEEK_END)
            stream.write(b"0123456789")

    with world.server() as url, Client(url) as kiln:
        with pytest.raises(BlobCorrupt):
            kiln.upload(large_file, change)
        assert list(kiln.uploads()) == []


def serve(settings: Settings, listener: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "service.api", "--fd", str(listener.fileno())],
        env={**os.environ, **settings.to_environment()},
        pass_fds=[listener.fileno()],
        stderr=subprocess.DEVNULL,
    )


def test_an_upload_survives_its_server(world: World, large_file: Path) -> None:
    servers: list[subprocess.Popen[bytes]] = []

    def kill(name: str, done: int, size: int) -> None:
        if done > 20 << 20 and len(servers) == 1:
            servers[0].send_signal(signal.SIGKILL)
            servers[0].wait()
            servers.append(serve(world.settings, listener))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        servers.append(serve(world.settings, listener))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with Client(url, patience_s=120) as kiln:
                assert kiln.upload(large_file, kill)["sha256"] == LARGE_DIGEST
                assert len(servers) == 2
        finally:
            for server in servers:
                server.kill()
                server.wait()


def test_the_command_uploads_files_and_prints_their_digests(run: Callable[..., Any], tmp_path: Path) -> None:
    small = tmp_path / "prompts.txt"
    small.write_bytes(DATA)
    result = run("upload", small)
    assert (result.exit_code, result.stdout) == (0, f"{DIGEST} {small}\n")
    assert run("upload", tmp_path / "nowhere").exit_code == 2
