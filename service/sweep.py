"""The sweep: gives disk back without ever losing a byte that something needs.

Owns the order of its moves and what is reported; `service.ledger.sweep` decides, `docs/decisions/0011-sweep.md` says
why it is safe beside running workers. Called by housekeeping (`workers.process`) and by `edgekiln gc`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Literal

from service.errors import BlobMissing, Conflict, NotFound
from service.ledger import resumable, sweep
from service.ledger.database import Database
from service.ledger.jobs import remove_job
from service.ledger.sweep import BlobRow, Retention
from service.settings import Settings
from service.storage import ObjectStore, StoredObject, blob_digest, blob_key

_BLOBS = "blobs/"
_LOG = "log"
#: What no step made.
_UNMADE = "upload"

Fate = Literal["removed", "condemned", "deleted", "missing"]


@dataclass(frozen=True)
class Finding:
    """One job or blob, what was done about it (in a dry run: what would be), and why."""

    fate: Fate
    #: `job`, `log`, `upload`, the kind of the step whose output it is, or `stray`;
    #: `download`, `copy` or `part` of a host's cache.
    kind: str
    #: Digest of a blob, id of a job, name of a cached download.
    digest: str
    size_bytes: int
    why: str


def read_retention(settings: Settings) -> Retention:
    """Return the policies in force."""
    return Retention(
        outputs_s=settings.keep_intermediates_s,
        uploads_s=settings.keep_uploads_s,
        unpublished_jobs_s=settings.keep_unpublished_jobs_s,
        published_jobs_s=settings.keep_published_jobs_s,
        wait_s=settings.condemned_s,
    )


def sweep_store(
    database: Database, store: ObjectStore, retention: Retention, *, dry_run: bool = False
) -> Iterator[Finding]:
    """Give up what is kept no longer, and yield each finding as it is made; a dry run changes nothing.

    Raises `StoreUnavailable`; what was done stays done.
    """
    # 1. what was condemned long enough ago
    wait_s = retention.wait_s
    for row in sweep.read_due(database, wait_s):
        delete = partial(store.delete, blob_key(row.digest))
        if dry_run or sweep.delete_condemned(database, row.digest, wait_s, delete):
            why = f"condemned {_say_time(wait_s)} ago or earlier"
            yield Finding("deleted", row.kind or _UNMADE, row.digest, row.size_bytes, why)
    # 2. jobs that ended long ago
    yield from _remove_jobs(database, retention, dry_run)
    # 3. what nobody has used for long, and what was left of removed jobs
    for row in sweep.read_unreferenced(database, retention) if dry_run else _condemn(database, retention):
        yield Finding("condemned", row.kind or _UNMADE, row.digest, row.size_bytes, _explain(row.kind, retention))
    # 4. where ledger and store differ
    yield from _compare(database, store, wait_s, dry_run)


def _explain(kind: str | None, retention: Retention) -> str:
    if kind == _LOG:
        return "log of a job that was removed"
    if kind is None:
        return f"upload, or in no row, not used for {_say_time(retention.uploads_s)}"
    return f"output of {kind}, not used for {_say_time(retention.outputs_s)}"


def _remove_jobs(database: Database, retention: Retention, dry_run: bool) -> Iterator[Finding]:
    if dry_run:
        for job_id, _ in sweep.read_expired_jobs(database, retention, None):
            yield _removed(job_id)
        return
    while expired := sweep.read_expired_jobs(database, retention):
        for job_id, tenant_id in expired:
            # It may have been opened again, or removed, meanwhile.
            with suppress(Conflict, NotFound):
                remove_job(database, tenant_id, job_id)
                yield _removed(job_id)


def _removed(job_id: str) -> Finding:
    return Finding("removed", "job", job_id, 0, "ended longer ago than jobs are kept")


def _condemn(database: Database, retention: Retention) -> Iterator[BlobRow]:
    while sweep.retire_unused_steps(database, retention.outputs_s):
        pass
    while sweep.drop_unused_uploads(database, retention.uploads_s):
        pass
    while resumable.drop_expired(database):
        pass
    while condemned := sweep.condemn_unreferenced(database):
        yield from condemned
    # Only now: their rows say what made the blobs. What they held besides were their logs.
    while sweep.forget_orphans(database, retention.wait_s):
        pass
    while condemned := sweep.condemn_unreferenced(database):
        yield from (replace(row, kind=row.kind or _LOG) for row in condemned)


def _compare(database: Database, store: ObjectStore, wait_s: float, dry_run: bool) -> Iterator[Finding]:
    """Condemn objects that no row names, and report rows whose objects are gone."""
    young = datetime.now(UTC) - timedelta(seconds=wait_s)
    objects = ((digest, found) for found in store.list(_BLOBS) if (digest := blob_digest(found.key)) is not None)
    for digest, row, found in _merge(sweep.read_stored(database), objects):
        if row is None and found is not None and found.modified_at <= young:
            if dry_run or sweep.condemn_stray(database, digest, found.size_bytes):
                yield Finding(
                    "condemned", "stray", digest, found.size_bytes, "in the store, in no row: its upload ended early"
                )
        elif row is not None and found is None and not row.is_condemned and _is_missing(database, store, digest):
            yield Finding("missing", row.kind or _UNMADE, digest, row.size_bytes, "in the ledger, not in the store")


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
