"""Uploads: what tenants bring besides checkpoints, and the hold of jobs and schedules on it.

Called by `service.api` and, when a job is submitted or scheduled, by `service.ledger.jobs` and `schedules`. Knowing a
digest grants nothing: a request may name what its own tenant has uploaded, and nothing else.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, and_, insert, or_, select

from service.errors import NotFound, UploadNotFound
from service.ledger import locks
from service.ledger.base import Base
from service.ledger.blobs import OutputFile, Reprieves, commit_blobs
from service.ledger.clock import now
from service.ledger.database import Transaction, reads, writes
from service.ledger.tables import Upload


@writes
def enter_upload(
    tx: Transaction, tenant_id: str, file: OutputFile, name: str | None, reprieves: Reprieves | None = None
) -> bool:
    """Enter bytes that are in the store as a tenant's; return whether they are new to it. Raises `BlobCondemned`."""
    return add_upload(tx, tenant_id, file, name, reprieves)


def add_upload(
    tx: Transaction, tenant_id: str, file: OutputFile, name: str | None, reprieves: Reprieves | None
) -> bool:
    """Enter an upload, or renew the name and the time of one with the same bytes; see `enter_upload`."""
    commit_blobs(tx, [file], reprieves)
    is_new = _find(tx.connection, tenant_id, [file.digest]) == set()
    values = {"size_bytes": file.size_bytes, "name": name, "created_at": now()}
    tx.connection.execute(
        tx.insert(Upload)
        .values(tenant_id=tenant_id, digest=file.digest, **values)
        .on_conflict_do_update(index_elements=["tenant_id", "digest"], set_=values)
    )
    return is_new


def hold_uploads(tx: Transaction, tenant_id: str, digests: Iterable[str], hold: type[Base], **holder_id: str) -> None:
    """Keep a tenant's uploads for as long as a new job or schedule is kept; raises `UploadNotFound`.

    `hold`: the table that says who holds what.
    """
    wanted = sorted(set(digests))
    if not wanted:
        return
    locks.lock_blobs(tx, wanted)
    require_uploads(tx.connection, tenant_id, wanted)
    for digest in wanted:
        tx.connection.execute(insert(hold).values(tenant_id=tenant_id, digest=digest, **holder_id))


@reads
def read_sizes(connection: Connection, tenant_id: str, digests: Iterable[str]) -> dict[str, int]:
    """Return digest -> bytes of a tenant's uploads; raises `UploadNotFound` unless all of them are there."""
    wanted = set(digests)
    require_uploads(connection, tenant_id, wanted)
    statement = select(Upload.digest, Upload.size_bytes).where(Upload.tenant_id == tenant_id, Upload.digest.in_(wanted))
    return {row.digest: row.size_bytes for row in connection.execute(statement)}


def require_uploads(connection: Connection, tenant_id: str, digests: Iterable[str]) -> None:
    """Raise `UploadNotFound` unless a tenant has uploaded all of these."""
    missing = sorted(set(digests) - _find(connection, tenant_id, digests))
    if missing:
        raise UploadNotFound(
            f"Nothing was uploaded here as {', '.join(missing)}. Upload it (`POST /v1/uploads`), then submit again.",
            digests=missing,
        )


def _find(connection: Connection, tenant_id: str, digests: Iterable[str]) -> set[str]:
    statement = select(Upload.digest).where(Upload.tenant_id == tenant_id, Upload.digest.in_(list(digests)))
    return set(connection.execute(statement).scalars())


@reads
def read_upload(connection: Connection, tenant_id: str, digest: str) -> dict[str, Any]:
    """Return one upload; raises `NotFound`."""
    return _document(_read_row(connection, tenant_id, digest))


def read_document(connection: Connection, tenant_id: str, digest: str) -> dict[str, Any] | None:
    """Return one upload; None once it is forgotten."""
    try:
        return _document(_read_row(connection, tenant_id, digest))
    except NotFound:
        return None


@reads
def list_uploads(
    connection: Connection, tenant_id: str, *, limit: int = 50, before: str | None = None
) -> list[dict[str, Any]]:
    """Return a tenant's uploads, newest first; `before` is the digest of the last one of the page before."""
    statement = select(Upload.__table__).where(Upload.tenant_id == tenant_id)
    if before is not None:
        last = _read_row(connection, tenant_id, before)
        is_older = Upload.created_at < last.created_at
        statement = statement.where(
            or_(is_older, and_(Upload.created_at == last.created_at, Upload.digest < last.digest))
        )
    rows = connection.execute(statement.order_by(Upload.created_at.desc(), Upload.digest.desc()).limit(limit))
    return [_document(row) for row in rows]


def _read_row(connection: Connection, tenant_id: str, digest: str) -> Any:
    row = connection.execute(
        select(Upload.__table__).where(Upload.tenant_id == tenant_id, Upload.digest == digest)
    ).one_or_none()
    if row is None:
        raise NotFound(f"There is no upload {digest!r}. `GET /v1/uploads` lists those there are.", digest=digest)
    return row


def _document(row: Any) -> dict[str, Any]:
    created_at: dt.datetime = row.created_at
    return {
        "sha256": row.digest,
        "size_bytes": row.size_bytes,
        "name": row.name,
        "created_at": created_at.isoformat(),
    }
