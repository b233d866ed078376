"""One suite for every object store: the folder store, and the S3 store against a real server process."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import random
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from service.errors import BlobCorrupt, BlobMissing, InvalidRequest, StoreUnavailable
from service.storage import (
    ObjectStore,
    S3Options,
    blob_key,
    check_stream,
    digest_bytes,
    digest_file,
    manifest_key,
    open_store,
    read_object,
)
from tests.services import make_bucket, make_s3_client, parse_s3_url, s3_server

#: The least that S3 takes for any part but the last.
PART_BYTES = 5 << 20
BUCKET = "artifacts"


@dataclasses.dataclass
class Bench:
    """A store under test and the back doors that a test needs beside it."""

    store: ObjectStore
    #: Replaces an object's bytes behind the store's back, keeping what the store noted about it.
    damage: Callable[[str, bytes], None]
    #: Leaves the remains of an upload that its process did not live to finish.
    begin_upload: Callable[[], None]


@pytest.fixture(scope="session")
def swift_options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Options]:
    with s3_server(tmp_path_factory.mktemp("swift") / "server") as address:
        yield reach(address)


@pytest.fixture(scope="session")
def rclone_options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Options]:
    with s3_server(tmp_path_factory.mktemp("rclone") / "server", "rclone") as address:
        yield reach(address)


def reach(address: dict[str, str]) -> S3Options:
    make_bucket(address, BUCKET)
    return S3Options(**address, addressing="path", part_size_bytes=PART_BYTES, list_page_size=3)


@functools.cache
def make_client(options: S3Options) -> Any:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=options.endpoint_url,
        region_name=options.region,
        aws_access_key_id=options.access_key_id,
        aws_secret_access_key=options.secret_access_key,
        config=Config(s3={"addressing_style": "path"}),
    )


#: A server that somebody has put beside the one that tests start; see `docs/configuration.md`.
NAMED_URL = os.environ.get("EDGEKILN_TEST_S3_URL")


@pytest.fixture(scope="session")
def named_options() -> S3Options:
    """Reach the server of `EDGEKILN_TEST_S3_URL`; its bucket is there or is made."""
    address, bucket = parse_s3_url(NAMED_URL or "")
    client = make_s3_client(address)
    if bucket not in {each["Name"] for each in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=bucket)
    return S3Options(**address, addressing="path", part_size_bytes=PART_BYTES, list_page_size=3)


@pytest.fixture(params=["folder", "swift", "swift-md5", "rclone", *(["named", "named-md5"] if NAMED_URL else [])])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    if request.param == "folder":
        return make_folder_bench(tmp_path / "store")
    server, _, checksum = request.param.partition("-")
    options: S3Options = request.getfixturevalue(f"{server}_options")
    if checksum:
        options = dataclasses.replace(options, upload_checksum="md5")
    bucket = parse_s3_url(NAMED_URL)[1] if server == "named" and NAMED_URL else BUCKET
    # The bucket may outlive the run.
    return make_s3_bench(options, bucket, prefix=f"tests/{uuid.uuid4().hex}")


def make_folder_bench(root: Path) -> Bench:
    return Bench(
        store=open_store(root.as_uri()),
        damage=lambda key, data: _write(root / key, data),
        begin_upload=lambda: _write(root / ".uploads" / "left-behind", b"half"),
    )


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def make_s3_bench(options: S3Options, bucket: str, prefix: str) -> Bench:
    client = make_client(options)

    def damage(key: str, data: bytes) -> None:
        address = {"Bucket": bucket, "Key": f"{prefix}/{key}"}
        fields = client.head_object(**address)["Metadata"]
        client.put_object(**address, Body=data, Metadata=fields)

    return Bench(
        store=open_store(f"s3://{bucket}/{prefix}", options),
        damage=damage,
        begin_upload=lambda: client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/blobs/left-behind"),
    )


@pytest.fixture(scope="session")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file of three parts, the last of one byte."""
    path = tmp_path_factory.mktemp("large") / "model"
    path.write_bytes(random.Random(1).randbytes(2 * PART_BYTES + 1))
    return path, digest_file(path)[0]


def put(store: ObjectStore, data: bytes) -> str:
    key = blob_key(digest_bytes(data))
    store.put_bytes(key, data)
    return key


def read(store: ObjectStore, key: str, start: int = 0, end: int | None = None) -> bytes:
    with store.open(key, start, end) as chunks:
        return b"".join(chunks)


def test_file_of_several_parts_comes_back_and_is_stored_once(
    bench: Bench, large_file: tuple[Path, str], tmp_path: Path
) -> None:
    path, sha256 = large_file
    key = blob_key(sha256)
    assert bench.store.put_file(key, path, sha256) is True
    assert bench.store.put_file(key, path, sha256) is False
    assert bench.store.stat(key).size_bytes == path.stat().st_size
    target = tmp_path / "copy"
    assert bench.store.get_file(key, target, sha256) == path.stat().st_size
    assert digest_file(target)[0] == sha256
    assert bench.store.abort_stale_uploads(-3600) == 0


def test_what_is_there_is_written_all_the_same_when_asked(
    bench: Bench, large_file: tuple[Path, str], tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"0123456789")
    for path in (small, large_file[0]):
        sha256 = digest_file(path)[0]
        key = blob_key(sha256)
        bench.store.put_file(key, path, sha256)
        assert bench.store.put_file(key, path, sha256, anew=True) is True
        assert bench.store.put_file(key, path, sha256) is False, "control"
        assert bench.store.get_file(key, tmp_path / "copy", sha256) == path.stat().st_size


@pytest.mark.parametrize(
    ("place", "is_short"),
    [(PART_BYTES, False), (2 * PART_BYTES, True)],
    ids=["flipped", "truncated"],
)
def test_damage_in_any_part_is_found(
    bench: Bench, large_file: tuple[Path, str], tmp_path: Path, place: int, is_short: bool
) -> None:
    path, sha256 = large_file
    key = blob_key(sha256)
    bench.store.put_file(key, path, sha256)
    damaged = bytearray(path.read_bytes())
    damaged[place : None if is_short else place + 1] = b"" if is_short else bytes([damaged[place] ^ 1])
    bench.damage(key, bytes(damaged))
    with pytest.raises(BlobCorrupt) as caught:
        bench.store.get_file(key, tmp_path / "copy", sha256)
    assert caught.value.details["found"] == hashlib.sha256(damaged).hexdigest()
    assert sorted(tmp_path.glob("copy*")) == sorted(tmp_path.glob(".part-*")) == []


def test_file_that_nobody_changes_comes_back(bench: Bench, large_file: tuple[Path, str], tmp_path: Path) -> None:
    path, sha256 = large_file
    source, target = tmp_path / "source", tmp_path / "copy"
    shutil.copyfile(path, source)
    key = blob_key(sha256)
    assert bench.store.put_file(key, source, sha256, is_final=True) is True
    assert bench.store.put_file(key, source, sha256, is_final=True) is False
    assert bench.store.get_file(key, target, sha256, is_read_only=True) == path.stat().st_size
    bench.store.delete(key)
    assert digest_file(target)[0] == sha256


def test_file_that_nobody_changes_is_checked_all_the_same(bench: Bench, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(b"0123456789")
    wrong = digest_bytes(b"other")
    with pytest.raises(BlobCorrupt):
        bench.store.put_file(blob_key(wrong), source, wrong, is_final=True)
    assert list(bench.store.list()) == []
    key = put(bench.store, b"0123456789")
    bench.damage(key, b"0123456780")
    with pytest.raises(BlobCorrupt):
        bench.store.get_file(key, target, digest_bytes(b"0123456789"), is_read_only=True)
    assert sorted(tmp_path.glob("copy*")) == sorted(tmp_path.glob(".part-*")) == []


@pytest.mark.parametrize("data", [b"", b"x", b"y" * 70_000])
def test_small_objects_come_back(bench: Bench, data: bytes, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(data)
    sha256, size_bytes = digest_file(source)
    assert size_bytes == len(data)
    assert bench.store.put_file(blob_key(sha256), source, sha256) is True
    assert bench.store.put_bytes(blob_key(sha256), data) is False
    assert read_object(bench.store, blob_key(sha256), sha256) == data
    assert read(bench.store, blob_key(sha256)) == data


def test_source_with_another_digest_is_refused_and_leaves_nothing(
    bench: Bench, large_file: tuple[Path, str], tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"changed while it was uploaded")
    wrong = digest_bytes(b"what it was")
    for path in (small, large_file[0]):
        with pytest.raises(BlobCorrupt):
            bench.store.put_file(blob_key(wrong), path, wrong)
        with pytest.raises(BlobMissing):
            bench.store.stat(blob_key(wrong))
    assert bench.store.abort_stale_uploads(-3600) == 0
    assert list(bench.store.list()) == []


def test_ranges_are_cut_at_the_end_of_the_object(bench: Bench) -> None:
    data = b"0123456789"
    key = put(bench.store, data)
    for start, end in [(0, 4), (3, None), (2, 2), (9, 10), (4, 100), (10, None), (25, None), (25, 30)]:
        assert read(bench.store, key, start, end) == data[start:end]
    for start, end in [(-1, None), (5, 4)]:
        with pytest.raises(ValueError, match="not a range"):
            read(bench.store, key, start, end)


def test_missing_objects_have_one_error(bench: Bench, tmp_path: Path) -> None:
    sha256 = digest_bytes(b"never stored")
    key = blob_key(sha256)
    with pytest.raises(BlobMissing, match=sha256):
        bench.store.stat(key)
    with pytest.raises(BlobMissing):
        read(bench.store, key)
    with pytest.raises(BlobMissing):
        read(bench.store, key, 3, 3)
    with pytest.raises(BlobMissing):
        bench.store.get_file(key, tmp_path / "copy", sha256)
    assert list(tmp_path.glob("copy*")) == []
    put(bench.store, b"a neighbour")
    with pytest.raises(BlobMissing):
        bench.store.stat("blobs")
    with pytest.raises(BlobMissing):
        bench.store.stat(f"{key}/below")


@pytest.mark.parametrize("damaged", [b"0123X56789", b"01234567", b""], ids=["flipped", "truncated", "emptied"])
def test_damage_is_found_by_every_whole_read(bench: Bench, damaged: bytes, tmp_path: Path) -> None:
    sha256 = digest_bytes(b"0123456789")
    key = put(bench.store, b"0123456789")
    bench.damage(key, damaged)
    with pytest.raises(BlobCorrupt) as caught:
        bench.store.get_file(key, tmp_path / "copy", sha256)
    assert caught.value.details["expected"] == sha256
    assert caught.value.details["found"] == hashlib.sha256(damaged).hexdigest()
    assert [path.name for path in tmp_path.iterdir() if path.name != "store"] == []
    with pytest.raises(BlobCorrupt):
        read_object(bench.store, key, sha256)


def test_damaged_stream_never_delivers_its_last_chunk() -> None:
    stream = check_stream([b"ab", b"cd", b"ef"], "key", digest_bytes(b"abcdeX"))
    assert [next(stream), next(stream)] == [b"ab", b"cd"]
    with pytest.raises(BlobCorrupt):
        next(stream)
    assert list(check_stream([b"ab", b"cd"], "key", digest_bytes(b"abcd"))) == [b"ab", b"cd"]


@pytest.mark.parametrize("damaged", [b"0123", b"0123X56789"], ids=["truncated", "flipped"])
def test_damaged_object_is_written_again(bench: Bench, damaged: bytes) -> None:
    data = b"0123456789"
    key = put(bench.store, data)
    bench.damage(key, damaged)
    assert bench.store.put_bytes(key, data) is True
    assert read(bench.store, key) == data


def test_failed_copy_keeps_the_file_that_was_there(bench: Bench, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    target.write_bytes(b"earlier")
    key = put(bench.store, b"0123456789")
    with pytest.raises(BlobCorrupt):
        bench.store.get_file(key, target, digest_bytes(b"other"))
    assert target.read_bytes() == b"earlier"


def test_delete_is_idempotent(bench: Bench) -> None:
    key = put(bench.store, b"to be deleted")
    bench.store.delete(key)
    with pytest.raises(BlobMissing):
        bench.store.stat(key)
    bench.store.delete(key)
    assert bench.store.put_bytes(key, b"to be deleted") is True


def test_listing_is_ordered_over_pages_and_honours_prefixes(bench: Bench) -> None:
    keys = ["a/b", "a-b", "a.b", "a/a/z", "a0", "b/1", "b/2", "b/3", "b/4", "b1/1"]
    for key in keys:
        bench.store.put_bytes(key, key.encode())
    listed = list(bench.store.list())
    assert [found.key for found in listed] == sorted(keys)
    assert {found.key: found.size_bytes for found in listed} == {key: len(key) for key in keys}
    assert all(found.modified_at.utcoffset() is not None for found in listed)
    for prefix in ("b/", "b", "a", "a/a", "b/2", "c", "b/1/"):
        assert [found.key for found in bench.store.list(prefix)] == sorted(k for k in keys if k.startswith(prefix))


def test_stale_uploads_are_swept_by_age(bench: Bench) -> None:
    key = put(bench.store, b"stays")
    bench.begin_upload()
    assert bench.store.abort_stale_uploads(3600) == 0
    assert bench.store.abort_stale_uploads(-3600) == 1
    assert bench.store.abort_stale_uploads(-3600) == 0
    assert [found.key for found in bench.store.list()] == [key]


def test_check_leaves_no_trace(bench: Bench) -> None:
    bench.store.check()
    assert list(bench.store.list()) == []


def test_keys_that_could_leave_the_store_are_refused(bench: Bench, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    actions: list[Callable[[str], object]] = [
        lambda key: bench.store.put_file(key, source, digest_bytes(b"x")),
        lambda key: bench.store.put_bytes(key, b"x"),
        lambda key: read(bench.store, key),
        lambda key: bench.store.get_file(key, tmp_path / "copy", digest_bytes(b"x")),
        lambda key: bench.store.stat(key),
        lambda key: bench.store.delete(key),
    ]
    for key in ["", "/a", "a/", "../a", "a/../b", "a//b", ".uploads/x", "a\\b", "a b", "a\n", "x" * 600]:
        for action in actions:
            with pytest.raises(InvalidRequest):
                action(key)
    for prefix in ["/", "..", "a/../", ".uploads"]:
        with pytest.raises(InvalidRequest):
            list(bench.store.list(prefix))


def test_writers_of_the_same_key_do_not_disturb_readers(
    bench: Bench, large_file: tuple[Path, str], tmp_path: Path
) -> None:
    path, sha256 = large_file
    key = blob_key(sha256)
    with ThreadPoolExecutor(4) as pool:
        written = [pool.submit(bench.store.put_file, key, path, sha256) for _ in range(3)]
        assert True in [future.result() for future in written]
        copies = [pool.submit(bench.store.get_file, key, tmp_path / f"copy{n}", sha256) for n in range(3)]
        assert {future.result() for future in copies} == {path.stat().st_size}
    assert [found.key for found in bench.store.list()] == [key]


def test_manifests_have_keys_of_their_own(bench: Bench) -> None:
    data = b'{"name": "a model"}'
    key = manifest_key(digest_bytes(data))
    assert bench.store.put_bytes(key, data) is True
    assert [found.key for found in bench.store.list("manifests/")] == [f"manifests/{digest_bytes(data)}.json"]


class Misbehaving(BaseHTTPRequestHandler):
    """Answers HEAD and GET as the server under `answer` says."""

    answer: str

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.answer == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.send_header("Last-Modified", "Sat, 01 Aug 2026 10:00:00 GMT")
            self.end_headers()
            self.wfile.write(b"only this")
        else:
            self.send_response(int(self.answer))
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def misbehaving_store(request: pytest.FixtureRequest) -> Iterator[ObjectStore]:
    handler = type("Handler", (Misbehaving,), {"answer": request.param})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield open_store("s3://bucket", make_options(server.server_port))
        finally:
            server.shutdown()
            thread.join()


def make_options(port: int) -> S3Options:
    return S3Options(
        endpoint_url=f"http://127.0.0.1:{port}",
        region="us-east-1",
        access_key_id="key",
        secret_access_key="secret",
        addressing="path",
        attempts=1,
    )


@pytest.mark.parametrize("misbehaving_store", ["500", "503", "429", "403"], indirect=True)
def test_refusals_of_the_server_are_retryable(misbehaving_store: ObjectStore) -> None:
    with pytest.raises(StoreUnavailable) as caught:
        misbehaving_store.stat("blobs/x")
    assert caught.value.retryable


@pytest.mark.parametrize("misbehaving_store", ["404"], indirect=True)
def test_missing_is_not_unavailable(misbehaving_store: ObjectStore) -> None:
    with pytest.raises(BlobMissing):
        misbehaving_store.stat("blobs/x")


@pytest.mark.parametrize("misbehaving_store", ["cut"], indirect=True)
def test_connection_lost_in_mid_read_leaves_no_file(misbehaving_store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable):
        misbehaving_store.get_file("blobs/x", tmp_path / "copy", digest_bytes(b"only this"))
    assert list(tmp_path.iterdir()) == []


def test_absent_server_is_unavailable() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving) as server:
        port = server.server_port
    with pytest.raises(StoreUnavailable, match="does not answer"):
        open_store("s3://bucket", make_options(port)).check()


def test_wrong_credentials_name_themselves(swift_options: S3Options) -> None:
    options = dataclasses.replace(swift_options, secret_access_key="wrong")
    with pytest.raises(StoreUnavailable, match="credentials"):
        open_store(f"s3://{BUCKET}", options).check()


@pytest.mark.parametrize(
    "wrong", [{"ChecksumSHA256": f"{'A' * 43}="}, {"ContentMD5": f"{'A' * 22}=="}], ids=["sha256", "md5"]
)
def test_server_refuses_a_bad_checksum(swift_options: S3Options, wrong: dict[str, str]) -> None:
    """A control of the server itself: one that took anything would prove nothing about part checksums."""
    client = make_client(swift_options)
    with pytest.raises(client.exceptions.ClientError, match=r"(?i)checksum|digest"):
        client.put_object(Bucket=BUCKET, Key="bad", Body=b"x", **wrong)
