"""Removes what the ledger need not remember. Called by the beat's task, from any worker."""

from __future__ import annotations

from sqlalchemy import delete, select

from service.ledger.clock import now
from service.ledger.database import Transaction, writes
from service.ledger.jobs import IDEMPOTENCY_S
from service.ledger.states import FINAL_JOB_STATES
from service.ledger.tables import Event, IdempotencyKey, Job

#: Progress of jobs that ended this long ago is of no use to anyone.
_PROGRESS_KEPT_S = 7 * 24 * 3600.0


@writes
def prune(tx: Transaction) -> None:
    """Forget old idempotency keys and the progress events of jobs long ended; states and results stay."""
    tx.connection.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < now(-IDEMPOTENCY_S)))
    ended = select(Job.id).where(Job.state.in_(FINAL_JOB_STATES), Job.finalized_at < now(-_PROGRESS_KEPT_S))
    tx.connection.execute(delete(Event).where(Event.kind == "progress", Event.job_id.in_(ended)))
