"""The sweep: gives disk back without ever losing a byte that something needs.

Owns the order of its moves and what is reported; `service.ledger.sweep` decides, `docs/decisions/0011-sweep.md` says
why it is safe beside running workers. Called by housekeeping (`workers.process`) and by `edgekiln gc`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Literal

from service.errors import BlobMissing
from service.ledger import sweep
from service.ledger.database import Database
from service.ledger.sweep import BlobRow
from service.storage import ObjectStore, StoredObject, blob_digest, blob_key

_BLOBS = "blobs/"

Fate = Literal["condemned", "deleted", "missing"]


@dataclass(frozen=True)
class Finding:
    """One blob, what was done about it (in a dry run: what would be), and why."""

    fate: Fate
    digest: str
    size_bytes: int
    why: str


def sweep_store(
    database: Database, store: ObjectStore, *, keep_s: float, wait_s: float, dry_run: bool = False
) -> Iterator[Finding]:
    """Give up what is unused, and yield each finding as it is made; a dry run changes nothing.

    `keep_s`: how long bytes that are only kept for reuse stay without use. `wait_s`: how long a condemned blob waits;
    it must exceed the time from an upload's begin to its commit. Raises `StoreUnavailable`; what was done stays done.
    """
    # 1. what was condemned long enough ago
    for row in sweep.read_due(database, wait_s):
        delete = partial(store.delete, blob_key(row.digest))
        if dry_run or sweep.delete_condemned(database, row.digest, wait_s, delete):
            yield Finding("deleted", row.digest, row.size_bytes, f"condemned {_say_time(wait_s)} ago or earlier")
    # 2. what nobody has used for long
    for row in _condemn(database, keep_s, dry_run):
        origin = f"output of {row.kind}" if row.kind else "upload, or in no row"
        yield Finding("condemned", row.digest, row.size_bytes, f"{origin}, not used for {_say_time(keep_s)}")
    # 3. where ledger and store differ
    yield from _compare(database, store, wait_s, dry_run)


def _condemn(database: Database, keep_s: float, dry_run: bool) -> Iterator[BlobRow]:
    if dry_run:
        yield from sweep.read_unreferenced(database, keep_s)
        return
    while sweep.retire_unused_steps(database, keep_s):
        pass
    while sweep.drop_unused_uploads(database, keep_s):
        pass
    while condemned := sweep.condemn_unreferenced(database):
        yield from condemned


def _compare(database: Database, store: ObjectStore, wait_s: float, dry_run: bool) -> Iterator[Finding]:
    """Condemn objects that no row names, and report rows whose objects are gone."""
    young = datetime.now(UTC) - timedelta(seconds=wait_s)
    objects = ((digest, found) for found in store.list(_BLOBS) if (digest := blob_digest(found.key)) is not None)
    for digest, row, found in _merge(sweep.read_stored(database), objects):
        if row is None and found is not None and found.modified_at <= young:
            if dry_run or sweep.condemn_stray(database, digest, found.size_bytes):
                yield Finding("condemned", digest, found.size_bytes, "in the store, in no row: its upload ended early")
        elif row is not None and found is None and not row.is_condemned and _is_missing(database, store, digest):
            yield Finding("missing", digest, row.size_bytes, "in the ledger, not in the store")


def _merge(
    rows: Iterator[BlobRow], objects: Iterable[tuple[str, StoredObject]]
) -> Iterator[tuple[str, BlobRow | None, StoredObject | None]]:
    """Pair two streams, both in the order of their digests."""
    row = next(rows, None)
    for digest, found in objects:
        while row is not None and row.digest < digest:
            yield row.digest, row, None
            row = next(rows, None)
        if row is not None and row.digest == digest:
            yield digest, row, found
            row = next(rows, None)
        else:
            yield digest, None, found
    while row is not None:
        yield row.digest, row, None
        row = next(rows, None)


def _is_missing(database: Database, store: ObjectStore, digest: str) -> bool:
    """Look again: the listing may be older than the row, and the row than the last sweep."""
    try:
        store.stat(blob_key(digest))
    except BlobMissing:
        return sweep.is_kept(database, digest)
    return False


def _say_time(seconds: float) -> str:
    for unit, length_s in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:g} {unit}"
    return f"{seconds:g} seconds"
