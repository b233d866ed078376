"""A checkpoint in a bucket of an S3-compatible server.

Owns how the objects below a prefix are listed, pinned (by version where the bucket keeps versions, else by `ETag` and
size) and read. The server is the operator's, never a request's; the credential is given, never looked for on the
machine, and without one requests are not signed. With `service.storage` the only place that knows boto3. Called through
`workers.fetch.sources.open_source`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import urllib3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from service.checkpoint_files import MAX_LISTED_FILES, SourceFile, choose_needed
from service.errors import (
    EdgeKilnError,
    InvalidRequest,
    SourceChanged,
    SourceForbidden,
    SourceNotFound,
    SourceUnavailable,
)
from workers.fetch.download import Body, Interrupted, download_all
from workers.fetch.http_body import write_range
from workers.fetch.sources import ByteProgress, FetchedFile, Pinned, digest_pins
from workers.steps import Progress

#: Requests at once: for what is known of objects, and for the ranges of a large one.
CONNECTIONS = 4
CONNECT_TIMEOUT_S = 10.0
TIMEOUT_S = 30.0
_ATTEMPTS = 3
_CHUNK_BYTES = 2**18
_MISSING = ("404", "NoSuchKey", "NoSuchVersion", "NoSuchBucket", "NotFound")
#: What servers call the one version of an object in a bucket without versions.
_NO_VERSION = "null"


class S3Source:
    """The objects of a bucket right below a prefix; its revision is a digest of what they are pinned by."""

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        files: Sequence[str | SourceFile] | None = None,
        revision: str | None = None,
        access: Mapping[str, Any] | None = None,
        credential: Mapping[str, str] | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        """`access`: `endpoint_url` and `region`; `credential`: `access_key_id` and `secret_access_key`."""
        self._bucket = bucket
        self._prefix = prefix
        self._folder = f"{prefix}/" if prefix else ""
        self._where = f"s3://{bucket}/{self._folder}"
        self._pinned = [each for each in files or () if isinstance(each, SourceFile)]
        self._revision = revision
        self._client = _connect(access or {}, credential)
        self._cache_dir = cache_dir

    def pin(self, progress: Progress) -> Pinned:
        """List the objects below the prefix and ask for what tells the needed ones from later ones."""
        progress(f"listing {self._where}")
        with self._errors():
            listed = self._list()
            if not listed:
                raise SourceNotFound(f"There is nothing right below {self._where}; check bucket and prefix.")
            needed = choose_needed(listed, f"The prefix {self._where}")
            with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="ask") as pool:
                files = choose_needed(pool.map(self._pin, needed), f"The prefix {self._where}")
        pins = [file.to_pin() for file in files]
        source = {"kind": "s3", "bucket": self._bucket, "prefix": self._prefix}
        return Pinned({**source, "revision": digest_pins(files), "files": pins}, files)

    def bring(self, output_dir: Path, progress: Progress) -> list[FetchedFile]:
        """Download the pinned objects; raises `SourceChanged` for one that was replaced or removed."""
        files = choose_needed(self._pinned, f"The prefix {self._where}")
        if self._revision is None or digest_pins(files) != self._revision:
            raise InvalidRequest("A prefix must be pinned by the resolve step before it is fetched.")
        count = ByteProgress(progress, "downloading", sum(file.size_bytes for file in files))
        return download_all(files, self._open_range, self._cache_dir, output_dir, count, connections=CONNECTIONS)

    def _list(self) -> list[SourceFile]:
        """Return what stands right below the prefix; more than a checkpoint may have is left to `choose_needed`."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._folder, Delimiter="/"
        )
        listed: list[SourceFile] = []
        for page in pages:
            items = page.get("Contents", ())
            listed.extend(SourceFile(item["Key"].removeprefix(self._folder), item["Size"]) for item in items)
            if len(listed) > MAX_LISTED_FILES:
                break
        return listed

    def _pin(self, file: SourceFile) -> SourceFile:
        head = self._client.head_object(Bucket=self._bucket, Key=self._folder + file.path)
        version = head.get("VersionId")
        return replace(
            file,
            size_bytes=head["ContentLength"],
            etag=head["ETag"],
            version=None if version == _NO_VERSION else version,
        )

    @contextmanager
    def _open_range(self, file: SourceFile, start: int, end: int | None) -> Iterator[Body]:
        asked = {
            "Bucket": self._bucket,
            "Key": self._folder + file.path,
            "IfMatch": file.etag,
            **write_range(start, end),
        }
        if file.version is not None:
            asked["VersionId"] = file.version
        try:
            with self._errors(file):
                answer = self._client.get_object(**asked)
        except SourceUnavailable as error:
            if "status" in error.details:
                raise
            raise Interrupted from None
        body = answer["Body"]
        try:
            # Some servers pass over the condition where a range is asked for.
            if answer.get("ETag") != file.etag:
                raise self._describe("PreconditionFailed", 412, file)
            is_part = answer["ResponseMetadata"]["HTTPStatusCode"] == 206
            if is_part and not answer.get("ContentRange", "").startswith(f"bytes {start}-"):
                raise Interrupted
            yield Body(start if is_part else 0, _read(body))
        finally:
            body.close()

    @contextmanager
    def _errors(self, file: SourceFile | None = None) -> Iterator[None]:
        """Turn what boto3 raises into typed errors that hold nothing of the credential."""
        failure: EdgeKilnError
        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))[:100]
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            failure = self._describe(code, status, file)
        except (BotoCoreError, urllib3.exceptions.HTTPError) as error:
            failure = SourceUnavailable(f"{self._where} could not be reached ({type(error).__name__}); retry later.")
        else:
            return
        raise failure from None

    def _describe(self, code: str, status: int | None, file: SourceFile | None) -> EdgeKilnError:
        if file is not None and (status == 412 or code in _MISSING):
            return SourceChanged(
                f"{self._where}{file.path} is no longer the object that the job was pinned to; submit the job again.",
                file=file.path,
            )
        if code in _MISSING:
            return SourceNotFound(f"There is no {self._where} ({code}); check bucket and prefix.", status=status)
        if status in (401, 403):
            return SourceForbidden(
                f"{self._where} may not be read ({code}). The operator gives the workers that fetch a key that may "
                "list and read it (EDGEKILN_SOURCE_S3_ACCESS_KEY_ID).",
                status=status,
            )
        return SourceUnavailable(
            f"{self._where} could not be read ({code}, HTTP {status}); retry later.", status=status
        )


def _read(body: Any) -> Iterator[bytes]:
    """Yield the bytes of an answer; raises `Interrupted` when its connection breaks."""
    while True:
        try:
            chunk = body.read(_CHUNK_BYTES)
        except (BotoCoreError, urllib3.exceptions.HTTPError, OSError):
            raise Interrupted from None
        if not chunk:
            return
        yield chunk


def _connect(access: Mapping[str, Any], credential: Mapping[str, str] | None) -> Any:
    endpoint_url = access.get("endpoint_url") or None
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        max_pool_connections=CONNECTIONS,
        # boto3 would look for a host per bucket, which servers of one's own rarely have.
        s3={"addressing_style": "path" if endpoint_url else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # Never the machine's own identity: its role may read more than sources.
        signature_version=None if credential else UNSIGNED,
    )
    keys = credential or {}
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=access.get("region") or "us-east-1",
        aws_access_key_id=keys.get("access_key_id"),
        aws_secret_access_key=keys.get("secret_access_key"),
        config=config,
    )
