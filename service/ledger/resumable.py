"""Resumable uploads: what has arrived of each, and until when the rest is waited for.

The bytes of a part are a blob as any other: in the store before its row, and swept when nothing refers to it. A part is
taken only at the offset that the row has, so that of two senders one goes on. Called by `service.api`; the sweep drops
what has expired. Once all parts are there, whoever holds the assembly makes an upload of them.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, func, insert, or_, select, update

from service.errors import Conflict, NotFound, QuotaExceeded
from service.ledger import locks, quotas
from service.ledger.blobs import OutputFile, Reprieves, commit_blobs
from service.ledger.clock import now
from service.ledger.database import Transaction, reads, writes
from service.ledger.keys import new_id
from service.ledger.quotas import is_awaited
from service.ledger.tables import ResumableUpload, UploadPart
from service.ledger.uploads import add_upload, read_document

#: Unfinished uploads that a tenant may have at once.
MAX_UNFINISHED = 100
#: Pieces of one upload: each is a row and an object.
MAX_PARTS = 10_000
#: Rows that one transaction takes.
_BATCH = 100


@dataclass(frozen=True)
class Announcement:
    """What a client says of a file before it sends it."""

    size_bytes: int
    #: What its owner calls it; for people.
    name: str | None
    #: What its SHA-256 must be in the end; None if the client does not know.
    digest: str | None


@writes
def begin_upload(tx: Transaction, tenant_id: str, announced: Announcement, keep_s: float) -> str:
    """Make room for a file that is about to be sent; return the id of its upload.

    Raises `QuotaExceeded` when the tenant has no room for all of it, or too many uploads that are not finished.
    """
    locks.lock_tenant(tx, tenant_id)
    mine = ResumableUpload.tenant_id == tenant_id, is_awaited()
    unfinished = tx.connection.execute(select(func.count()).select_from(ResumableUpload).where(*mine)).scalar_one()
    if unfinished >= MAX_UNFINISHED:
        raise QuotaExceeded(
            f"The tenant {tenant_id!r} has {unfinished} unfinished uploads. Finish or delete some "
            "(`GET /v1/uploads/resumable` lists them).",
            quota="unfinished_uploads",
            used=unfinished,
            limit=MAX_UNFINISHED,
        )
    quotas.require_room_for_bytes(tx.connection, tenant_id, announced.size_bytes)
    upload_id = new_id("upl")
    tx.connection.execute(
        insert(ResumableUpload).values(
            id=upload_id,
            tenant_id=tenant_id,
            name=announced.name,
            size_bytes=announced.size_bytes,
            offset_bytes=0,
            announced_digest=announced.digest,
            created_at=now(),
            expires_at=now(keep_s),
        )
    )
    return upload_id


@writes
def add_part(
    tx: Transaction,
    tenant_id: str,
    upload_id: str,
    offset_bytes: int,
    file: OutputFile,
    keep_s: float,
    reprieves: Reprieves | None = None,
) -> None:
    """Enter bytes that are in the store as the next part of an upload.

    Raises `Conflict` when another sender was there first, `BlobCondemned`, and `NotFound`.
    """
    moved = tx.connection.execute(
        update(ResumableUpload)
        .where(
            *_of(tenant_id, upload_id),
            ResumableUpload.offset_bytes == offset_bytes,
            ResumableUpload.size_bytes >= offset_bytes + file.size_bytes,
        )
        .values(offset_bytes=offset_bytes + file.size_bytes, expires_at=now(keep_s))
    )
    if moved.rowcount != 1:
        raise refuse_part(_read_row(tx.connection, tenant_id, upload_id).offset_bytes)
    count = select(func.count()).where(UploadPart.upload_id == upload_id)
    if tx.connection.execute(count).scalar_one() >= MAX_PARTS:
        raise Conflict(f"The upload came in {MAX_PARTS} pieces and takes no more. Begin anew, with larger ones.")
    commit_blobs(tx, [file], reprieves)
    tx.connection.execute(
        insert(UploadPart).values(
            upload_id=upload_id, offset_bytes=offset_bytes, digest=file.digest, size_bytes=file.size_bytes
        )
    )


def refuse_part(offset_bytes: int) -> Conflict:
    """Build the error for bytes that do not begin where an upload goes on."""
    return Conflict(
        f"The upload has {offset_bytes} bytes: go on from there. `HEAD` tells how many there are.",
        offset_bytes=offset_bytes,
    )


@reads
def read_resumable(connection: Connection, tenant_id: str, upload_id: str) -> dict[str, Any]:
    """Return an upload with its state; raises `NotFound`, also of what has expired."""
    return _document(connection, _read_row(connection, tenant_id, upload_id))


@reads
def list_resumable(connection: Connection, tenant_id: str) -> list[dict[str, Any]]:
    """Return a tenant's uploads that are not stored yet, newest first."""
    rows = connection.execute(
        select(ResumableUpload.__table__)
        .where(ResumableUpload.tenant_id == tenant_id, is_awaited())
        .order_by(ResumableUpload.created_at.desc(), ResumableUpload.id.desc())
    )
    return [_document(connection, row) for row in rows]


@writes
def remove_resumable(tx: Transaction, tenant_id: str, upload_id: str) -> None:
    """Forget an upload and its parts; what it became stays. Raises `NotFound`."""
    # Another tenant's is not even locked: whoever asked would wait for its parts.
    _read_row(tx.connection, tenant_id, upload_id)
    locks.lock_resumable(tx, upload_id)
    _read_row(tx.connection, tenant_id, upload_id)
    _remove(tx, [upload_id])


@writes
def drop_expired(tx: Transaction) -> int:
    """Forget uploads that nobody has gone on with in time; return how many there were."""
    expired = select(ResumableUpload.id).where(ResumableUpload.expires_at <= now()).limit(_BATCH)
    if tx.is_postgresql:
        # One that just gets a part, or goes, is left alone.
        expired = expired.with_for_update(skip_locked=True)
    upload_ids = list(tx.connection.execute(expired).scalars())
    _remove(tx, upload_ids)
    return len(upload_ids)


# --- assembly -----------------------------------------------------------------------------------


@writes
def claim_assembly(tx: Transaction, tenant_id: str, upload_id: str, hold_s: float) -> bool:
    """Take the assembly of an upload that is all there, unless somebody holds it; return whether it was taken.

    The hold saves work and is no fence: of two that assemble, the first to finish counts.
    """
    is_free = or_(ResumableUpload.assembled_until.is_(None), ResumableUpload.assembled_until <= now())
    taken = tx.connection.execute(
        update(ResumableUpload)
        .where(
            *_of(tenant_id, upload_id),
            is_awaited(),
            ResumableUpload.offset_bytes == ResumableUpload.size_bytes,
            is_free,
        )
        .values(assembled_until=now(hold_s))
    )
    return taken.rowcount == 1


@writes
def hold_assembly(tx: Transaction, upload_id: str, hold_s: float) -> None:
    """Hold an assembly for longer, or with 0 give it back."""
    tx.connection.execute(
        update(ResumableUpload).where(ResumableUpload.id == upload_id).values(assembled_until=now(hold_s))
    )


@writes
def put_off_assembly(tx: Transaction, upload_id: str, pause_s: float) -> None:
    """Count a try that failed for what passes, and let the next one wait."""
    tx.connection.execute(
        update(ResumableUpload)
        .where(ResumableUpload.id == upload_id)
        .values(assembled_until=now(pause_s), failed_tries=ResumableUpload.failed_tries + 1)
    )


@reads
def read_parts(connection: Connection, upload_id: str) -> list[OutputFile]:
    """Return the parts of an upload in order."""
    statement = select(UploadPart.__table__).where(UploadPart.upload_id == upload_id).order_by(UploadPart.offset_bytes)
    return [OutputFile("part", row.digest, row.size_bytes) for row in connection.execute(statement)]


@writes
def finish_assembly(
    tx: Transaction, tenant_id: str, upload_id: str, file: OutputFile, reprieves: Reprieves | None = None
) -> None:
    """Make an upload of what was assembled and stored; raises `NotFound` if it was given up, and `BlobCondemned`.

    Of two that assemble, the first counts.
    """
    row = _read_row(tx.connection, tenant_id, upload_id)
    if _close(tx, upload_id, digest=file.digest):
        add_upload(tx, tenant_id, file, row.name, reprieves)


@writes
def fail_assembly(tx: Transaction, upload_id: str, error: Mapping[str, Any]) -> None:
    """Say why nothing can be made of the parts, and forget them; another may have made an upload of them already."""
    _close(tx, upload_id, error=dict(error))


def _close(tx: Transaction, upload_id: str, **values: Any) -> bool:
    """End an upload that is still open, and forget its parts; return whether it was."""
    statement = update(ResumableUpload).where(ResumableUpload.id == upload_id, is_awaited())
    if tx.connection.execute(statement.values(**values, assembled_until=None)).rowcount != 1:
        return False
    tx.connection.execute(delete(UploadPart).where(UploadPart.upload_id == upload_id))
    return True


def _of(tenant_id: str, upload_id: str) -> tuple[ColumnElement[bool], ...]:
    return (
        ResumableUpload.id == upload_id,
        ResumableUpload.tenant_id == tenant_id,
        ResumableUpload.expires_at > now(),
    )


def _remove(tx: Transaction, upload_ids: list[str]) -> None:
    """Delete uploads whose rows are locked: nobody adds a part meanwhile."""
    tx.connection.execute(delete(UploadPart).where(UploadPart.upload_id.in_(upload_ids)))
    tx.connection.execute(delete(ResumableUpload).where(ResumableUpload.id.in_(upload_ids)))


def _read_row(connection: Connection, tenant_id: str, upload_id: str) -> Any:
    row = connection.execute(select(ResumableUpload.__table__).where(*_of(tenant_id, upload_id))).one_or_none()
    if row is None:
        raise NotFound(
            f"There is no resumable upload {upload_id[:80]!r}, or it was waited for too long. Begin it anew.",
            upload_id=upload_id[:80],
        )
    return row


def _document(connection: Connection, row: Any) -> dict[str, Any]:
    expires_at: dt.datetime = row.expires_at
    held_until: dt.datetime | None = row.assembled_until
    return {
        "id": row.id,
        "state": _name_state(row),
        "name": row.name,
        "size_bytes": row.size_bytes,
        "offset_bytes": row.offset_bytes,
        "sha256": row.announced_digest,
        "upload": None if row.digest is None else read_document(connection, row.tenant_id, row.digest),
        "error": row.error,
        "assembled_until": held_until.isoformat() if held_until else None,
        "failed_tries": row.failed_tries,
        "created_at": row.created_at.isoformat(),
        "expires_at": expires_at.isoformat(),
    }


def _name_state(row: Any) -> str:
    if row.error is not None:
        return "failed"
    if row.digest is not None:
        return "stored"
    return "receiving" if row.offset_bytes < row.size_bytes else "assembling"
