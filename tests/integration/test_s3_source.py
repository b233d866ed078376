"""Checkpoints in buckets of a real S3 server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.errors import (
    CheckpointUnsafe,
    EdgeKilnError,
    InvalidRequest,
    SourceChanged,
    SourceForbidden,
    SourceNotAllowed,
    SourceNotFound,
    SourceUnavailable,
)
from service.settings import load_settings
from tests.api_world import World
from tests.services import free_port, make_s3_client, s3_server
from workers.fetch import download, fetch, resolve
from workers.source_access import describe_access, read_credential

WEIGHTS = bytes(range(256)) * 4000
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
    "modeling_evil.py": b"raise SystemExit",
    "original/model.safetensors": b"a second copy",
}
NEEDED = ["config.json", "model.safetensors", "tokenizer.json"]


def ignore_progress(message: str, fraction: float | None = None) -> None:
    """Take progress and drop it."""


class Bucket:
    """A bucket, and how a worker is told to read it."""

    def __init__(self, address: dict[str, str], name: str) -> None:
        self.name = name
        self.client = make_s3_client(address)
        self.client.create_bucket(Bucket=name)
        self.access = {"endpoint_url": address["endpoint_url"], "region": address["region"]}
        self.credential = {name: address[name] for name in ("access_key_id", "secret_access_key")}
        self.source: dict[str, Any] = {"kind": "s3", "bucket": name, "prefix": "models/tiny"}

    def put(self, files: dict[str, bytes], prefix: str = "models/tiny/") -> None:
        for name, data in files.items():
            self.client.put_object(Bucket=self.name, Key=prefix + name, Body=data)

    def pin(self, **changed: Any) -> dict[str, Any]:
        params = {"source": {**self.source, **changed}, "access": self.access, "credential": self.credential}
        return resolve.run(params, {}, Path("/nonexistent"), ignore_progress)

    def bring(self, source: dict[str, Any], output_dir: Path, **params: Any) -> dict[str, Any]:
        output_dir.mkdir()
        params = {"source": source, "access": self.access, "credential": self.credential, **params}
        return fetch.run(params, {}, output_dir, ignore_progress)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with s3_server(tmp_path_factory.mktemp("s3") / "server") as reached:
        yield reached


@pytest.fixture
def bucket(address: dict[str, str], request: pytest.FixtureRequest) -> Bucket:
    bucket = Bucket(address, f"b{hashlib.sha256(request.node.name.encode()).hexdigest()[:20]}")
    bucket.put(FILES)
    return bucket


def test_the_objects_below_a_prefix_are_pinned_and_brought(bucket: Bucket, tmp_path: Path) -> None:
    figures = bucket.pin()
    assert [file["path"] for file in figures["files"]] == NEEDED
    assert figures["source"]["files"][0]["etag"] == f'"{hashlib.md5(FILES["config.json"]).hexdigest()}"'
    assert bucket.pin(prefix="models/tiny")["source"] == figures["source"]
    brought = bucket.bring(figures["source"], tmp_path / "out")
    assert {file["path"]: file["sha256"] for file in brought["files"]} == {
        name: hashlib.sha256(FILES[name]).hexdigest() for name in NEEDED
    }
    assert bucket.credential["secret_access_key"] not in json.dumps([figures, brought])


def test_a_large_object_comes_in_parallel_ranges_and_is_resumed(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "SEGMENT_BYTES", 100_000)
    source = bucket.pin()["source"]
    part = tmp_path / "cache" / "model.safetensors"
    part.parent.mkdir()
    part.write_bytes(WEIGHTS[:123_456])
    bucket.bring(source, tmp_path / "out", cache_dir=str(part.parent))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS


def test_an_object_that_was_replaced_or_removed_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    source = bucket.pin()["source"]
    bucket.put({"tokenizer.json": b"[]"})
    with pytest.raises(SourceChanged, match=r"tokenizer\.json is no longer"):
        bucket.bring(source, tmp_path / "first")
    bucket.client.delete_object(Bucket=bucket.name, Key="models/tiny/tokenizer.json")
    with pytest.raises(SourceChanged, match=r"tokenizer\.json is no longer"):
        bucket.bring(source, tmp_path / "second")


def test_a_version_is_brought_after_it_was_replaced(bucket: Bucket, tmp_path: Path) -> None:
    bucket.client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"})
    bucket.put(FILES)
    source = bucket.pin()["source"]
    assert all(file["version"] for file in source["files"])
    bucket.put({"config.json": b"{}"})
    bucket.bring(source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == FILES["config.json"]
    assert bucket.pin()["source"]["revision"] != source["revision"]


def test_what_cannot_be_read_has_its_own_sentence(bucket: Bucket) -> None:
    with pytest.raises(SourceNotFound, match="nothing right below"):
        bucket.pin(prefix="elsewhere")
    with pytest.raises(SourceNotFound, match="NoSuchBucket"):
        bucket.pin(bucket="no-such-bucket")
    bucket.put({"pytorch_model.bin": b"", "config.json": b"{}"}, "pickles/")
    with pytest.raises(CheckpointUnsafe, match="a pickle"):
        bucket.pin(prefix="pickles")


@pytest.mark.parametrize("credential", [None, {"access_key_id": "test:tester", "secret_access_key": "hush-hush"}])
def test_without_the_right_key_nothing_is_read_and_nothing_told(
    bucket: Bucket, credential: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a machine's own identity would be found by; it is not looked for.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", bucket.credential["access_key_id"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", bucket.credential["secret_access_key"])
    bucket.credential = credential  # type: ignore[assignment]
    # This server does not know unsigned requests as a refusal of rights.
    with pytest.raises(EdgeKilnError if credential is None else SourceForbidden) as caught:
        bucket.pin()
    assert "hush-hush" not in json.dumps(caught.value.to_json())
    assert caught.value.__cause__ is None


def test_a_server_that_is_away_is_retryable(bucket: Bucket) -> None:
    bucket.access["endpoint_url"] = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(SourceUnavailable, match="could not be reached"):
        bucket.pin()


def test_a_source_that_nobody_pinned_is_not_fetched(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="must be pinned"):
        bucket.bring({**bucket.pin()["source"], "revision": "0" * 64}, tmp_path / "out")


@pytest.mark.parametrize(
    ("prefix", "is_allowed"), [("models", True), ("models/tiny", True), ("models-2", False), ("", False)]
)
def test_only_the_operators_buckets_and_prefixes_may_be_named(
    world: World, http: TestClient, prefix: str, is_allowed: bool
) -> None:
    source = {"kind": "s3", "bucket": "sources", "prefix": prefix}
    assert http.post("/v1/jobs", json={"source": source}).json()["code"] == "source_not_allowed"
    with world.http(source_s3_buckets=("other", "sources/models/")) as narrowed:
        answer = narrowed.post("/v1/jobs", json={"source": source})
    assert answer.status_code == (201 if is_allowed else 403)


def test_a_worker_decides_by_its_own_settings_and_gives_the_key_to_this_kind_alone() -> None:
    source = {"kind": "s3", "bucket": "sources", "prefix": ""}
    key = {"source_s3_access_key_id": "id", "source_s3_secret_access_key": "hush"}
    with pytest.raises(SourceNotAllowed, match="EDGEKILN_SOURCE_S3_BUCKETS"):
        describe_access(load_settings(key), source)
    settings = load_settings({**key, "source_s3_buckets": ("sources",), "source_s3_region": "r", "hub_token": "hf_x"})
    assert describe_access(settings, source)["access"] == {"endpoint_url": "", "region": "r"}
    assert read_credential(settings, source) == {"access_key_id": "id", "secret_access_key": "hush"}
    assert read_credential(settings, {"kind": "https"}) is None
    assert read_credential(settings, {"kind": "hub"}) == "hf_x"
    assert "hush" not in repr(settings)
