"""From a setting to a store.

Owns the two URL forms, `file:///path` and `s3://bucket/prefix`. Called once per process by the API and by each
worker.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from service.errors import InvalidSettings
from service.settings import Settings
from service.storage.folder import FolderStore
from service.storage.keys import check_key
from service.storage.protocol import ObjectStore


@dataclass(frozen=True)
class S3Options:
    """How to talk to an S3-compatible server. Unset credentials leave the choice to boto3's own chain."""

    #: Server URL; None is AWS.
    endpoint_url: str | None = None
    region: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    #: `path` for servers without a host name per bucket.
    addressing: Literal["auto", "path", "virtual"] = "auto"
    #: Checksum sent with every upload and checked by the server. `md5` (Content-MD5) is for servers that do not
    #: know the newer SHA-256 header.
    upload_checksum: Literal["sha256", "md5"] = "sha256"
    #: boto3's own extra checksums. Since 1.36 its default is `when_supported`, which breaks some servers.
    request_checksum_calculation: Literal["when_required", "when_supported"] = "when_required"
    response_checksum_validation: Literal["when_required", "when_supported"] = "when_required"
    #: Files above this size go up in parts of at least this size, and come down in ranges of it.
    part_size_bytes: int = 16 << 20
    #: Parts of one file on their way at once.
    parallel: int = 8
    list_page_size: int = 1000
    connect_timeout_s: float = 10.0
    #: Silence on an open connection, not the length of a transfer.
    read_timeout_s: float = 60.0
    #: Tries of one request inside boto3 (network errors, 5xx, throttling).
    attempts: int = 4


def open_store(url: str, s3: S3Options | None = None) -> ObjectStore:
    """Open the store that `url` names; raises `InvalidSettings` for a URL that names none."""
    parts = urlsplit(url)
    if parts.query or parts.fragment:
        raise InvalidSettings(f"The store URL {url!r} must not hold a query or a fragment.")
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return FolderStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        # boto3 takes 0.3 s to import, and the embedded profile does without it.
        from service.storage.s3 import S3Store

        prefix = parts.path.strip("/")
        return S3Store(parts.netloc, check_key(prefix) if prefix else "", s3 or S3Options())
    raise InvalidSettings(f"The store URL {url!r} must look like file:///absolute/path or s3://bucket/prefix.")


def open_configured_store(settings: Settings) -> ObjectStore:
    """Open the store that the settings name; every process of one installation gets the same."""
    s3 = S3Options(
        endpoint_url=settings.s3_endpoint_url or None,
        region=settings.s3_region or None,
        # boto3 would look for a host per bucket, which servers of one's own rarely have.
        addressing="path" if settings.s3_endpoint_url else "auto",
        upload_checksum=settings.s3_upload_checksum,
        request_checksum_calculation=settings.s3_request_checksums,
        response_checksum_validation=settings.s3_response_checksums,
        part_size_bytes=settings.s3_part_bytes,
        parallel=settings.s3_connections,
    )
    return open_store(settings.object_store_url, s3)
