"""Events: what happened to a job, numbered without gaps.

The number is raised under the job's row lock, so that a reader who has seen event n has seen all before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import insert, update

from service.ledger.clock import now
from service.ledger.database import Transaction
from service.ledger.tables import Event, Job


def emit(tx: Transaction, job_ids: Iterable[str], kind: str, data: Mapping[str, Any]) -> None:
    """Append one event to each job, in id order."""
    for job_id in sorted(job_ids):
        number, tenant_id = tx.connection.execute(
            update(Job)
            .where(Job.id == job_id)
            .values(event_count=Job.event_count + 1)
            .returning(Job.event_count, Job.tenant_id)
        ).one()
        tx.connection.execute(
            insert(Event).values(
                job_id=job_id, number=number, tenant_id=tenant_id, kind=kind, data=dict(data), created_at=now()
            )
        )
