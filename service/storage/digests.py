"""SHA-256 of files and streams.

Owns the one place where bytes are compared with the digest they are stored under. Must not know any store's
innards. Called by the stores, by `workers.runner` and by the API when it serves a download.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from service.errors import BlobCorrupt
from service.storage.disk import disk_errors
from service.storage.keys import check_digest

if TYPE_CHECKING:
    from service.storage.protocol import ObjectStore


def digest_file(path: Path) -> tuple[str, int]:
    """Return SHA-256 (hex) and size in bytes of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return digest, stream.tell()


def digest_bytes(data: bytes) -> str:
    """Return SHA-256 (hex) of `data`."""
    return hashlib.sha256(data).hexdigest()


def digest_stream(chunks: Iterable[bytes]) -> str:
    """Return SHA-256 (hex) of all that comes."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def report_corrupt(key: str, expected: str, found: str, size_bytes: int) -> BlobCorrupt:
    """Build the error for bytes that are not what they should be."""
    return BlobCorrupt(
        f"The bytes read for {key} have SHA-256 {found}, but {expected} was expected ({size_bytes} bytes were "
        "read). The copy is damaged: nothing was made of it. Run the step that wrote it again.",
        key=key,
        expected=expected,
        found=found,
        size_bytes=size_bytes,
    )


def check_stream(chunks: Iterable[bytes], key: str, sha256: str) -> Iterator[bytes]:
    """Pass chunks on and raise `BlobCorrupt` instead of the last one when the digest is wrong.

    Holding back the last chunk leaves whoever reads a damaged object with an incomplete copy, never with a
    complete wrong one.
    """
    check_digest(sha256)
    digest = hashlib.sha256()
    size_bytes = 0
    held: bytes | None = None
    for chunk in chunks:
        if held is not None:
            yield held
        digest.update(chunk)
        size_bytes += len(chunk)
        held = chunk
    if digest.hexdigest() != sha256:
        raise report_corrupt(key, sha256, digest.hexdigest(), size_bytes)
    if held is not None:
        yield held


def read_object(store: ObjectStore, key: str, sha256: str) -> bytes:
    """Read a small object whole; raises `BlobMissing` and `BlobCorrupt`."""
    with store.open(key) as chunks:
        return b"".join(check_stream(chunks, key, sha256))


def copy_object(store: ObjectStore, key: str, path: Path, sha256: str) -> int:
    """Write an object to `path` through a temporary neighbour and return its size in bytes.

    Not flushed to disk: whoever reads after a power cut checks the digest again.
    """
    size_bytes = 0
    with store.open(key) as chunks, disk_errors(path.parent):
        partial = path.with_name(f".part-{uuid.uuid4().hex}")
        try:
            with partial.open("xb") as stream:
                for chunk in check_stream(chunks, key, sha256):
                    size_bytes += stream.write(chunk)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return size_bytes
