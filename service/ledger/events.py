"""Events: what happened to a job, numbered without gaps.

The number is raised under the job's row lock, so that a reader who has seen event n has seen all before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from sqlalchemy import update

from service.ledger.bulk import insert_together
from service.ledger.clock import now
from service.ledger.database import Transaction
from service.ledger.tables import Event, Job


def emit(tx: Transaction, job_ids: Iterable[str], kind: str, data: Mapping[str, Any]) -> None:
    """Append one event to each job; a transaction writes all of its events together, before it commits."""
    if not tx.events:
        tx.closing.append(partial(_write, tx))
    for job_id in job_ids:
        tx.events.setdefault(job_id, []).append((kind, dict(data)))


def _write(tx: Transaction) -> None:
    rows = []
    for job_id, events in sorted(tx.events.items()):
        last, tenant_id, at = tx.connection.execute(
            update(Job)
            .where(Job.id == job_id)
            .values(event_count=Job.event_count + len(events))
            .returning(Job.event_count, Job.tenant_id, now())
        ).one()
        rows += [
            {"job_id": job_id, "number": number, "tenant_id": tenant_id, "kind": kind, "data": data, "created_at": at}
            for number, (kind, data) in enumerate(events, start=last - len(events) + 1)
        ]
    insert_together(tx, (Event, rows))
