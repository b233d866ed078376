"""Objects in a bucket of an S3-compatible server.

Owns all that EdgeKiln knows of boto3. Uploads are digested while they are sent and carry a checksum that the
server verifies; large files go up in parts and come down in ranges, several at once; an upload that does not complete
is aborted.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import urllib3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from service.errors import BlobMissing, EdgeKilnError, StoreUnavailable
from service.storage.digests import copy_object, digest_bytes, digest_stream, report_corrupt
from service.storage.keys import check_digest, check_key, check_prefix
from service.storage.parts import Part, PartBody, copy_ranges, cut, send_parts
from service.storage.protocol import StoredObject

if TYPE_CHECKING:
    from service.storage.factory import S3Options

_CHUNK_BYTES = 1 << 20
#: AWS takes 10,000 parts, other servers as few as 1,000: parts of a terabyte are of a gigabyte, and all take 5 GiB.
_MAX_PARTS = 1000
#: User metadata that holds the object's full digest; S3's own is a digest of digests for an object in parts.
_DIGEST_FIELD = "sha256"
_MISSING = {"404", "NoSuchKey", "NotFound"}


class S3Store:
    """An `ObjectStore` in `bucket`, below `prefix`."""

    def __init__(self, bucket: str, prefix: str, options: S3Options) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.options = options
        self._client: Any = _connect(options)

    def put_file(self, key: str, path: Path, sha256: str, *, is_final: bool = False, anew: bool = False) -> bool:
        """See `ObjectStore.put_file`; what seems to be there by its size and noted digest is read."""
        check_key(key)
        check_digest(sha256)
        with path.open("rb") as stream:
            size_bytes = os.fstat(stream.fileno()).st_size
            if not anew and self._holds(key, sha256, size_bytes):
                return False
            if size_bytes <= self.options.part_size_bytes:
                self._put_whole(key, stream.read(), sha256)
            else:
                self._put_parts(key, stream.fileno(), sha256, size_bytes)
        self._require_size(key, size_bytes)
        return True

    def put_bytes(self, key: str, data: bytes) -> bool:
        """See `ObjectStore.put_bytes`."""
        sha256 = digest_bytes(data)
        if self._holds(check_key(key), sha256, len(data)):
            return False
        self._put_whole(key, data, sha256)
        self._require_size(key, len(data))
        return True

    @contextmanager
    def open(self, key: str, start: int = 0, end: int | None = None) -> Iterator[Iterator[bytes]]:
        """See `ObjectStore.open`."""
        if start < 0 or (end is not None and end < start):
            raise ValueError(f"[{start}, {end}) is not a range of bytes")
        if start == end:
            self.stat(key)
            yield iter(())
            return
        extra = {} if (start, end) == (0, None) else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        try:
            with self._errors(key):
                body = self._client.get_object(**self._address(check_key(key)), **extra)["Body"]
        except _RangeOutside:
            yield iter(())
            return
        try:
            yield self._read(key, body)
        finally:
            body.close()

    def get_file(self, key: str, path: Path, sha256: str, *, is_read_only: bool = False) -> int:
        """See `ObjectStore.get_file`; a large object comes in ranges, several at once."""
        check_digest(sha256)
        size_bytes = self.stat(key).size_bytes
        if size_bytes <= self.options.part_size_bytes:
            return copy_object(self, key, path, sha256)
        parts = cut(size_bytes, self.options.part_size_bytes)
        return copy_ranges(partial(self.open, key), key, path, sha256, parts, parallel=self.options.parallel)

    def shares_disk_with(self, folder: Path) -> bool:
        """It does not."""
        return False

    def stat(self, key: str) -> StoredObject:
        """See `ObjectStore.stat`."""
        head = self._head(check_key(key))
        return StoredObject(key, head["ContentLength"], head["LastModified"].astimezone(UTC))

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        check_key(key)
        with contextlib.suppress(BlobMissing), self._errors(key):
            self._client.delete_object(**self._address(key))

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See `ObjectStore.list`; one request a page, sent when it is needed."""
        full = self.prefix + check_prefix(prefix)
        return self._list(prefix, full)

    def abort_stale_uploads(self, older_than_s: float) -> int:
        """See `ObjectStore.abort_stale_uploads`; the age is the time since the upload began."""
        limit = datetime.now(UTC) - timedelta(seconds=older_than_s)
        aborted = 0
        with self._errors(self.prefix):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=self.prefix
            )
            for page in pages:
                for upload in page.get("Uploads", []):
                    if upload["Initiated"] <= limit:
                        self._abort(upload["Key"], upload["UploadId"])
                        aborted += 1
        return aborted

    def check(self) -> None:
        """See `ObjectStore.check`."""
        key = f"probes/{uuid.uuid4().hex}"
        data = key.encode()
        try:
            self.put_bytes(key, data)
            with self.open(key) as chunks:
                if b"".join(chunks) != data:
                    raise StoreUnavailable(f"Bucket {self.bucket} returned other bytes than were written to it.")
        finally:
            self.delete(key)

    def _address(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    def _head(self, key: str) -> dict[str, Any]:
        with self._errors(key):
            head: dict[str, Any] = self._client.head_object(**self._address(key))
        return head

    def _holds(self, key: str, sha256: str, size_bytes: int) -> bool:
        try:
            head = self._head(key)
            # Some servers return field names in title case.
            fields = {name.lower(): value for name, value in head["Metadata"].items()}
            if head["ContentLength"] != size_bytes or fields.get(_DIGEST_FIELD) != sha256:
                return False
            # What was noted with the bytes does not say how they have fared since: a damaged object must not stand in
            # the way of those who make it again.
            with self.open(key) as chunks:
                return digest_stream(chunks) == sha256
        except BlobMissing:
            return False

    def _require_size(self, key: str, size_bytes: int) -> None:
        found = self.stat(key).size_bytes
        if found != size_bytes:
            raise StoreUnavailable(
                f"Bucket {self.bucket} holds {found} bytes of {key} after an upload of {size_bytes}.", key=key
            )

    def _put_whole(self, key: str, data: bytes, sha256: str) -> None:
        if digest_bytes(data) != sha256:
            raise report_corrupt(key, sha256, digest_bytes(data), len(data))
        checksum = self._new_checksum()
        checksum.update(data)
        with self._errors(key):
            self._client.put_object(
                **self._address(key),
                Body=data,
                Metadata={_DIGEST_FIELD: sha256},
                **self._name_checksum(checksum.digest()),
            )

    def _put_parts(self, key: str, descriptor: int, sha256: str, size_bytes: int) -> None:
        with self._errors(key):
            algorithm = {"ChecksumAlgorithm": "SHA256"} if self.options.upload_checksum == "sha256" else {}
            created = self._client.create_multipart_upload(
                **self._address(key), Metadata={_DIGEST_FIELD: sha256}, **algorithm
            )
        upload_id = created["UploadId"]
        is_complete = False
        try:
            proofs = send_parts(
                descriptor,
                cut(size_bytes, self.options.part_size_bytes, _MAX_PARTS),
                key,
                sha256,
                checksum=self._new_checksum,
                send=partial(self._send_part, key, upload_id),
                parallel=self.options.parallel,
            )
            with self._errors(key):
                self._client.complete_multipart_upload(
                    **self._address(key), UploadId=upload_id, MultipartUpload={"Parts": proofs}
                )
            is_complete = True
        finally:
            if not is_complete:
                # The reason of the failure matters more than a failing abort; the sweep finds what is left.
                with contextlib.suppress(EdgeKilnError), self._errors(key):
                    self._abort(self.prefix + key, upload_id)

    def _send_part(self, key: str, upload_id: str, part: Part, body: PartBody, digest: bytes) -> dict[str, Any]:
        checksum = self._name_checksum(digest)
        with self._errors(key):
            answer = self._client.upload_part(
                **self._address(key), UploadId=upload_id, PartNumber=part.number, Body=body, **checksum
            )
        proof = {name: value for name, value in checksum.items() if name == "ChecksumSHA256"}
        return {"PartNumber": part.number, "ETag": answer["ETag"], **proof}

    def _abort(self, full_key: str, upload_id: str) -> None:
        with contextlib.suppress(self._client.exceptions.NoSuchUpload):
            self._client.abort_multipart_upload(Bucket=self.bucket, Key=full_key, UploadId=upload_id)

    def _new_checksum(self) -> hashlib._Hash:
        if self.options.upload_checksum == "sha256":
            return hashlib.sha256()
        return hashlib.md5(usedforsecurity=False)

    def _name_checksum(self, digest: bytes) -> dict[str, str]:
        """Return the argument by which the server is told the checksum of a request's body."""
        name = "ChecksumSHA256" if self.options.upload_checksum == "sha256" else "ContentMD5"
        return {name: base64.b64encode(digest).decode()}

    def _read(self, key: str, body: Any) -> Iterator[bytes]:
        while True:
            with self._errors(key):
                chunk = body.read(_CHUNK_BYTES)
            if not chunk:
                return
            yield chunk

    def _list(self, prefix: str, full: str) -> Iterator[StoredObject]:
        paginator = self._client.get_paginator("list_objects_v2")
        size = {"PageSize": self.options.list_page_size}
        pages = iter(paginator.paginate(Bucket=self.bucket, Prefix=full, PaginationConfig=size))
        while True:
            with self._errors(prefix):
                page = next(pages, None)
            if page is None:
                return
            for item in page.get("Contents", []):
                key = item["Key"].removeprefix(self.prefix)
                yield StoredObject(key, item["Size"], item["LastModified"].astimezone(UTC))

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turn what boto3 raises into the tree of `service.errors`."""
        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in _MISSING:
                raise BlobMissing(f"There is no object {key} in bucket {self.bucket}.", key=key) from None
            if code in ("416", "InvalidRange"):
                raise _RangeOutside(f"Object {key} ends before the range asked for.", key=key) from None
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            advice = {
                401: "Check the store's credentials.",
                403: "Check the store's credentials and what they may do in this bucket.",
            }.get(status, "The work is taken up again when it answers.")
            raise StoreUnavailable(
                f"Bucket {self.bucket} refused {error.operation_name} for {key or 'the bucket'}: "
                f"{code} (HTTP {status}). {advice}",
                key=key,
                status=status,
            ) from error
        except (BotoCoreError, urllib3.exceptions.HTTPError, OSError) as error:
            raise StoreUnavailable(
                f"The store of bucket {self.bucket} does not answer: {type(error).__name__}: {error}. Check its "
                "address, its credentials and the network.",
                key=key,
            ) from error


class _RangeOutside(StoreUnavailable):
    """The range begins at or after the object's end; caught in `S3Store.open`."""


def _connect(options: S3Options) -> Any:
    config = Config(
        connect_timeout=options.connect_timeout_s,
        read_timeout=options.read_timeout_s,
        retries={"mode": "standard", "total_max_attempts": options.attempts},
        # Several transfers of one process share them; those above are closed after use.
        max_pool_connections=8 * options.parallel,
        s3={"addressing_style": options.addressing},
        request_checksum_calculation=options.request_checksum_calculation,
        response_checksum_validation=options.response_checksum_validation,
    )
    # A session of its own: boto3's default one is not safe between threads.
    return boto3.session.Session().client(
        "s3",
        endpoint_url=options.endpoint_url,
        region_name=options.region,
        aws_access_key_id=options.access_key_id,
        aws_secret_access_key=options.secret_access_key,
        config=config,
    )
