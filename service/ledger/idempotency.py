"""Submissions that are sent twice: a tenant's `Idempotency-Key` names one job, whatever made it.

Called inside the transactions that enter jobs, by `service.ledger.jobs` and `service.ledger.benchmarks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select

from service.errors import IdempotencyMismatch
from service.ledger.clock import now
from service.ledger.database import Transaction
from service.ledger.tables import IdempotencyKey

#: How long an `Idempotency-Key` is remembered.
IDEMPOTENCY_S = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Submission:
    """The answer to a submission."""

    job_id: str
    #: False when the same `Idempotency-Key` had already made the job.
    is_new: bool
    #: The job as its readers see it, if it is new.
    document: dict[str, Any] | None = None


def claim_idempotency_key(tx: Transaction, tenant_id: str, key: str, digest: str, job_id: str) -> str | None:
    """Take the key for `job_id`, or return the job that has it."""
    tx.connection.execute(
        delete(IdempotencyKey).where(
            IdempotencyKey.tenant_id == tenant_id,
            IdempotencyKey.key == key,
            IdempotencyKey.created_at < now(-IDEMPOTENCY_S),
        )
    )
    inserted = tx.connection.execute(
        tx.insert(IdempotencyKey)
        .values(tenant_id=tenant_id, key=key, request_digest=digest, job_id=job_id, created_at=now())
        .on_conflict_do_nothing()
        .returning(IdempotencyKey.key)
    ).first()
    if inserted is not None:
        return None
    row = tx.connection.execute(
        select(IdempotencyKey.request_digest, IdempotencyKey.job_id).where(
            IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.key == key
        )
    ).one()
    if row.request_digest != digest:
        raise IdempotencyMismatch(
            f"The Idempotency-Key {key!r} was used for another request. Use a fresh key for a new request.", key=key
        )
    return str(row.job_id)
