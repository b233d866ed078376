"""What every object store promises.

Owns the `ObjectStore` protocol; `tests/contract/test_object_store.py` holds each store to it. Stores are
safe to share between threads, and several processes may write the same key at once: the bytes are equal, and
a reader sees the whole object or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class StoredObject:
    """One object as the store lists it."""

    #: Key relative to the store's root or bucket prefix.
    key: str
    size_bytes: int
    #: When it was last written; aware UTC.
    modified_at: datetime


class ObjectStore(Protocol):
    """A flat map from keys to bytes.

    Every method raises `InvalidRequest` for a malformed key, `StoreUnavailable` (retryable) when the store
    does not answer, and `DiskFull` (retryable) when there is no space left where it writes.
    """

    def put_file(self, key: str, path: Path, sha256: str, *, is_final: bool = False, anew: bool = False) -> bool:
        """Store the file's bytes, durable when it returns; True if they were written, False if they were there.

        `is_final` promises that nobody writes to the file any more: a store on the same disk may then take the file
        itself, by a hard link, in place of a copy. `anew` writes even what is there: then the time it takes tells
        whoever waits nothing about what others have stored.

        Bytes are digested as they are sent: `BlobCorrupt` if the file's digest is not `sha256`, and then
        nothing is stored. An object of the same digest and size is left alone; any other is replaced.
        """

    def put_bytes(self, key: str, data: bytes) -> bool:
        """Store a small object (a manifest); the same promises as `put_file`."""

    def open(self, key: str, start: int = 0, end: int | None = None) -> AbstractContextManager[Iterator[bytes]]:
        """Open the bytes `[start, end)`, cut at the object's end, as chunks; `BlobMissing` if there are none.

        The digest is not checked here: a whole read goes through `check_stream`, `read_object` or `get_file`.
        """

    def get_file(self, key: str, path: Path, sha256: str, *, is_read_only: bool = False) -> int:
        """Copy the object to `path` and return its size in bytes.

        `is_read_only` promises that nobody will write to the file: a store on the same disk may then give its own, by a
        hard link. The file appears only when its digest is right. Raises `BlobMissing` and `BlobCorrupt`.
        """

    def shares_disk_with(self, folder: Path) -> bool:
        """Whether files below `folder` can be hard links of objects, so that copies there would gain nothing."""

    def stat(self, key: str) -> StoredObject:
        """Describe the object, or raise `BlobMissing`."""

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens when there is none."""

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """Yield the objects whose keys start with `prefix`, in order of their keys, page by page."""

    def abort_stale_uploads(self, older_than_s: float) -> int:
        """Remove the remains of uploads that nobody finished, and return how many there were.

        `older_than_s` must exceed the longest upload: a younger one may still be running.
        """

    def check(self) -> None:
        """Write, read and delete a tiny object; return if all went well (for `/readyz`)."""
