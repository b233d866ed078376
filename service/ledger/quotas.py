"""Quotas: how much of the service one tenant may use at once, and how much it does.

What a tenant has too much of is refused before it is stored (`QuotaExceeded`); steps beyond the number that may run
wait. Nothing that was accepted is ever ended for a quota. Called by `jobs`, `schedules` and `claims` here, and by
`service.api.uploads`; set by `edgekiln tenants`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Connection, bindparam, func, select, union, update

from service.errors import NotFound, QuotaExceeded
from service.ledger import locks
from service.ledger.clock import now
from service.ledger.database import StaleView, Transaction, reads, writes
from service.ledger.due import is_running
from service.ledger.tables import (
    Attempt,
    Blob,
    Job,
    ResumableUpload,
    Schedule,
    Step,
    StepOutput,
    Tenant,
    Upload,
)

#: Quota -> what is counted, as its refusal words it.
QUOTAS = {
    "running_steps": "running steps",
    "unfinished_jobs": "unfinished jobs",
    "stored_bytes": "stored bytes",
    "schedules": "schedules",
}
_LIMITS = select(Tenant.__table__, now().label("read_at")).where(Tenant.id == bindparam("tenant"))


@writes
def set_quotas(tx: Transaction, tenant_id: str, limits: Mapping[str, int | None]) -> None:
    """Set some of a tenant's quotas, None for no limit; the others stay. Raises `NotFound`."""
    values = {f"max_{name}": limits[name] for name in QUOTAS if name in limits}
    found = tx.connection.execute(update(Tenant).where(Tenant.id == tenant_id).values(**values))
    if found.rowcount != 1:
        raise NotFound(f"There is no tenant {tenant_id!r}. `edgekiln tenants` lists those there are.", tenant=tenant_id)


@reads
def list_tenants(connection: Connection) -> list[dict[str, Any]]:
    """Return the tenants with their quotas: what each uses, and its limit."""
    rows = connection.execute(select(Tenant.__table__).order_by(Tenant.id)).all()
    return [
        {
            "id": row.id,
            "created_at": row.created_at.isoformat(),
            "quotas": {
                name: {"used": _read_use(connection, row.id, name), "limit": getattr(row, f"max_{name}")}
                for name in QUOTAS
            },
        }
        for row in rows
    ]


def require_room_for_job(tx: Transaction, tenant_id: str) -> dt.datetime:
    """Raise `QuotaExceeded` if the tenant may have no further job; until the commit nobody else adds one for it.

    Returns the database's time, which whoever enters the job needs anyway.
    """
    row = tx.connection.execute(_LIMITS, {"tenant": tenant_id}).one()
    if row.max_unfinished_jobs is not None:
        locks.lock_tenant(tx, tenant_id)
    _require_room(tx.connection, tenant_id, "unfinished_jobs", row.max_unfinished_jobs)
    _require_room(tx.connection, tenant_id, "stored_bytes", row.max_stored_bytes)
    read_at: dt.datetime = row.read_at
    return read_at


def require_room_for_schedule(tx: Transaction, tenant_id: str) -> None:
    """Raise `QuotaExceeded` if the tenant may have no further schedule; see `require_room_for_job`."""
    limit = _read_limits(tx.connection, tenant_id)["schedules"]
    if limit is not None:
        locks.lock_tenant(tx, tenant_id)
    _require_room(tx.connection, tenant_id, "schedules", limit)


@reads
def require_room_for_upload(connection: Connection, tenant_id: str) -> None:
    """Raise `QuotaExceeded` if the tenant may store nothing more."""
    _require_room(connection, tenant_id, "stored_bytes", _read_limits(connection, tenant_id)["stored_bytes"])


def require_room_for_bytes(connection: Connection, tenant_id: str, size_bytes: int) -> None:
    """Raise `QuotaExceeded` unless a tenant may store so much beside what it has and what it has announced."""
    limit = _read_limits(connection, tenant_id)["stored_bytes"]
    if limit is None:
        return
    used = _read_use(connection, tenant_id, "stored_bytes")
    if used + size_bytes > limit:
        raise QuotaExceeded(
            f"The tenant {tenant_id!r} has or awaits {used} stored bytes, its quota is {limit}, and the upload has "
            f"{size_bytes}. Ask the operator for more (`edgekiln tenants limit`).",
            quota="stored_bytes",
            used=used,
            limit=limit,
        )


def require_slot(tx: Transaction, tenant_id: str, limit: int | None) -> None:
    """Keep two hosts from starting a tenant's last permitted step twice over; `limit` is its quota of running steps.

    Raises `StaleView` when the quota was used up since `service.ledger.due` looked: the claim looks again.
    """
    if limit is None:
        return
    locks.lock_tenant(tx, tenant_id)
    if _read_use(tx.connection, tenant_id, "running_steps") >= limit:
        raise StaleView


def _require_room(connection: Connection, tenant_id: str, name: str, limit: int | None) -> None:
    if limit is None:
        return
    used = _read_use(connection, tenant_id, name)
    if used >= limit:
        raise QuotaExceeded(
            f"The tenant {tenant_id!r} has {used} {QUOTAS[name]}, and its quota is {limit}. Wait until it has fewer, "
            "or ask the operator for more (`edgekiln tenants limit`).",
            quota=name,
            used=used,
            limit=limit,
        )


def _read_limits(connection: Connection, tenant_id: str) -> dict[str, int | None]:
    row = connection.execute(_LIMITS, {"tenant": tenant_id}).one()
    return {name: getattr(row, f"max_{name}") for name in QUOTAS}


def _read_use(connection: Connection, tenant_id: str, name: str) -> int:
    counted: dict[str, Any] = {
        "running_steps": select(func.count()).where(
            is_running(), Step.lease_expires_at > now(), Step.tenant_id == tenant_id
        ),
        "unfinished_jobs": select(func.count()).where(Job.tenant_id == tenant_id, Job.finalized_at.is_(None)),
        "schedules": select(func.count()).where(Schedule.tenant_id == tenant_id),
        "stored_bytes": select(_sum_held(tenant_id) + _sum_awaited(tenant_id)),
    }
    return int(connection.execute(counted[name]).scalar_one())


def is_awaited() -> ColumnElement[bool]:
    """Whether an upload in pieces is neither stored nor failed nor expired."""
    return ResumableUpload.digest.is_(None) & ResumableUpload.error.is_(None) & (ResumableUpload.expires_at > now())


def _sum_awaited(tenant_id: str) -> ColumnElement[int]:
    """Return the sizes of all files that are on their way in pieces, as announced: what has arrived is part of them."""
    sizes = select(func.coalesce(func.sum(ResumableUpload.size_bytes), 0))
    return sizes.where(ResumableUpload.tenant_id == tenant_id, is_awaited()).scalar_subquery()


def _sum_held(tenant_id: str) -> ColumnElement[int]:
    """Return the bytes of what a tenant has made or uploaded, each content once."""
    outputs = select(StepOutput.digest).join(Step, Step.id == StepOutput.step_id).where(Step.tenant_id == tenant_id)
    logs = select(Attempt.log_digest).join(Step, Step.id == Attempt.step_id).where(Step.tenant_id == tenant_id)
    uploads = select(Upload.digest).where(Upload.tenant_id == tenant_id)
    held = union(outputs, logs.where(Attempt.log_digest.is_not(None)), uploads).subquery()
    # From what is held to its blobs: the other way round every blob would be read.
    sizes = select(func.coalesce(func.sum(Blob.size_bytes), 0)).join_from(held, Blob, Blob.digest == held.c.digest)
    return sizes.where(Blob.swept_at.is_(None)).scalar_subquery()
