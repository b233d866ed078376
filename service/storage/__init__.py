"""Bytes under their digest: the `ObjectStore` protocol, its stores, and the checks around them.

Owns where blobs and manifests stand and how they get there unharmed. Must not know jobs, steps or the
database: which blob may be deleted is decided by `service.ledger`. Called by the API (downloads, uploads),
by `workers.runner` (inputs, outputs) and by `workers.publish`.
"""

from __future__ import annotations

from service.storage.digests import check_stream, digest_bytes, digest_file, read_object
from service.storage.factory import S3Options, open_configured_store, open_store
from service.storage.keys import blob_digest, blob_key, check_digest, check_key, manifest_key
from service.storage.protocol import ObjectStore, StoredObject

__all__ = [
    "ObjectStore",
    "S3Options",
    "StoredObject",
    "blob_digest",
    "blob_key",
    "check_digest",
    "check_key",
    "check_stream",
    "digest_bytes",
    "digest_file",
    "manifest_key",
    "open_configured_store",
    "open_store",
    "read_object",
]
