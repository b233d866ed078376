"""Names of objects: `blobs/<first two hex>/<sha256>` and `manifests/<sha256>.json`.

Owns the grammar of keys, so that no store ever sees a key that climbs out of its root. Pure. Called by every
store and by whoever builds a key.
"""

from __future__ import annotations

import re

from service.errors import InvalidRequest

#: No segment starts with a dot: `..` cannot be said, and stores keep dot names for themselves.
_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_KEY = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")
_PREFIX = re.compile(rf"(?:{_SEGMENT}/)*(?:{_SEGMENT})?")
_DIGEST = re.compile(r"[0-9a-f]{64}")
#: S3 allows 1024 bytes; the rest is left to a bucket prefix.
_MAX_KEY_CHARACTERS = 512


def check_digest(sha256: str) -> str:
    """Return `sha256` if it is 64 lower-case hex digits, else raise `InvalidRequest`."""
    if not _DIGEST.fullmatch(sha256):
        raise InvalidRequest(f"{sha256!r} is not a SHA-256 digest: 64 lower-case hex digits are needed.")
    return sha256


def blob_key(sha256: str) -> str:
    """Return the key of the blob with this digest."""
    check_digest(sha256)
    return f"blobs/{sha256[:2]}/{sha256}"


def blob_digest(key: str) -> str | None:
    """Return the digest of the blob with this key; None for a key of anything else."""
    digest = key.rpartition("/")[2]
    return digest if _DIGEST.fullmatch(digest) and blob_key(digest) == key else None


def manifest_key(sha256: str) -> str:
    """Return the key of the manifest with this digest."""
    return f"manifests/{check_digest(sha256)}.json"


def check_key(key: str) -> str:
    """Return `key` if it is a relative name without dot segments, else raise `InvalidRequest`."""
    if len(key) > _MAX_KEY_CHARACTERS or not _KEY.fullmatch(key):
        raise InvalidRequest(
            f"{key[:80]!r} is not an object key: segments of letters, digits, '_', '-' and '.', none "
            f"starting with '.' or '-', joined by '/', at most {_MAX_KEY_CHARACTERS} characters.",
            key=key[:_MAX_KEY_CHARACTERS],
        )
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix` if some key may start with it, else raise `InvalidRequest`."""
    if len(prefix) > _MAX_KEY_CHARACTERS or not _PREFIX.fullmatch(prefix):
        raise InvalidRequest(f"{prefix[:80]!r} is not the beginning of an object key.")
    return prefix
