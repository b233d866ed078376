"""Uploads over REST: stored once, named by digest, seen by their tenant alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.api import schemas
from service.client import Client
from service.errors import InvalidRequest, PayloadTooLarge, UploadNotFound
from service.ledger import access
from service.storage import blob_key
from tests.api_world import World

TEXT = b'{"prompt": "1+2=", "answer": "3"}\n' * 100
DIGEST = hashlib.sha256(TEXT).hexdigest()


def test_the_same_bytes_are_stored_once(world: World, http: TestClient) -> None:
    first = http.post("/v1/uploads", content=TEXT, params={"name": "text.txt"})
    second = http.post("/v1/uploads", content=TEXT, params={"name": "again.txt"})
    assert (first.status_code, second.status_code) == (201, 200)
    schemas.UploadDocument.model_validate(first.json())
    assert (first.json()["sha256"], first.json()["size_bytes"]) == (DIGEST, len(TEXT))
    listed = http.get("/v1/uploads").json()
    schemas.UploadList.model_validate(listed)
    assert [(item["sha256"], item["name"]) for item in listed["uploads"]] == [(DIGEST, "again.txt")]
    with world.store.open(blob_key(DIGEST)) as chunks:
        assert b"".join(chunks) == TEXT
    assert list((world.settings.cache_dir / "uploads").iterdir()) == []


def test_pages_of_uploads_follow_each_other(http: TestClient) -> None:
    made = [http.post("/v1/uploads", content=bytes([number])).json()["sha256"] for number in range(5)]
    seen: list[str] = []
    before: str | None = None
    while True:
        page = http.get("/v1/uploads", params={"limit": 2, **({"before": before} if before else {})}).json()
        seen += [item["sha256"] for item in page["uploads"]]
        before = page["next"]
        if before is None:
            break
    assert sorted(seen) == sorted(made)
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"", {}, 422, "invalid_request"),
        (b"x" * 1025, {}, 413, "payload_too_large"),
        (iter([b"x" * 1000, b"x" * 25]), {}, 413, "payload_too_large"),
        (b"--x", {"Content-Type": "multipart/form-data; boundary=x"}, 422, "invalid_request"),
    ],
    ids=["empty", "declared too large", "sent too large", "a form"],
)
def test_what_is_no_upload_is_refused(world: World, body: Any, headers: dict[str, str], status: int, code: str) -> None:
    with world.http(max_upload_bytes=1024) as http:
        answer = http.post("/v1/uploads", content=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert http.get("/v1/uploads").json()["uploads"] == []
        assert http.post("/v1/uploads", content=b"x" * 1024).status_code == 201, "control: the limit itself passes"
    assert len(list(world.store.list())) == 1


def test_other_bodies_keep_their_own_limit(world: World) -> None:
    with world.http(max_body_bytes=1024) as http:
        assert http.post("/v1/uploads", content=b"x" * 4096).status_code == 201
        assert http.post("/v1/jobs", content=b"x" * 4096).status_code == 413


def test_a_request_names_what_its_own_tenant_uploaded(world: World, http: TestClient) -> None:
    access.ensure_tenant(world.database, "other")
    key = access.create_key(world.database, "other", "test").secret
    assert http.post("/v1/uploads", content=TEXT).status_code == 201
    body = {"source": world.source, "evaluation": DIGEST}
    foreign = http.post("/v1/jobs", json=body, headers={"Authorization": f"Bearer {key}"})
    assert (foreign.status_code, foreign.json()["code"]) == (422, "upload_not_found")
    assert http.get("/v1/uploads", headers={"Authorization": f"Bearer {key}"}).json()["uploads"] == []
    job = http.post("/v1/jobs", json=body)
    assert job.status_code == 201
    assert job.json()["request"]["evaluation"] == DIGEST
    unknown = http.post("/v1/jobs", json={**body, "perplexity_text": "0" * 64})
    assert (unknown.status_code, unknown.json()["code"]) == (422, "upload_not_found")
    assert len(http.get("/v1/jobs").json()["jobs"]) == 1


@pytest.mark.parametrize(
    ("purpose", "content", "words"),
    [
        ({"evaluation": None}, b'{"prompt": "1+1="}\n', "The evaluation, line 1: not"),
        ({"perplexity_text": None}, b"\xff\xfe", "The text for perplexity: not UTF-8"),
        ({"calibration": {"kind": "prompts"}}, b'{"prompt": "1"}\n' + b"[" * 100_000, "line 2: not"),
        ({"calibration": {"kind": "text"}}, b" \n", "The calibration data: empty"),
    ],
    ids=["pairs", "text", "prompts", "empty"],
)
def test_an_upload_that_no_step_could_read_is_refused_at_once(
    world: World, http: TestClient, purpose: dict[str, Any], content: bytes, words: str
) -> None:
    digest = http.post("/v1/uploads", content=content).json()["sha256"]
    ((name, kind),) = purpose.items()
    asked = {name: {**kind, "upload": digest} if kind else digest}
    answer = http.post("/v1/jobs", json={"source": world.source, **asked})
    assert answer.status_code == 422
    assert words in answer.json()["detail"]
    assert answer.json()["code"] in ("evaluation_invalid", "calibration_invalid")
    assert http.get("/v1/jobs").json()["jobs"] == []
    # What it holds is nobody else's business.
    access.ensure_tenant(world.database, "other")
    key = access.create_key(world.database, "other", "test").secret
    foreign = http.post("/v1/jobs", json={"source": world.source, **asked}, headers={"Authorization": f"Bearer {key}"})
    assert foreign.json()["code"] == "upload_not_found"


@pytest.mark.parametrize("evaluation", ["abc", "G" * 64, "A" * 64, "../" + "0" * 61])
def test_a_digest_looks_like_one(world: World, http: TestClient, evaluation: str) -> None:
    answer = http.post("/v1/jobs", json={"source": world.source, "evaluation": evaluation})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_the_client_uploads_over_a_real_socket(world: World, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(TEXT)
    with world.server(max_upload_bytes=len(TEXT)) as url, Client(url) as kiln:
        assert kiln.upload(path)["sha256"] == DIGEST
        assert kiln.upload(path)["name"] == "prompts.txt"
        assert [item["sha256"] for item in kiln.uploads(page_size=1)] == [DIGEST]
        job = kiln.submit(source=world.source, calibration={"kind": "prompts", "upload": DIGEST})
        assert job["request"]["calibration"]["upload"] == DIGEST
        with pytest.raises(UploadNotFound):
            kiln.submit(source=world.source, evaluation="0" * 64)
        (tmp_path / "empty").touch()
        with pytest.raises(InvalidRequest, match="empty"):
            kiln.upload(tmp_path / "empty")
        path.write_bytes(b"x" * (8 << 20))
        with pytest.raises(PayloadTooLarge):
            kiln.upload(path)
