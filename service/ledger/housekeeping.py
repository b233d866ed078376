"""Removes what the ledger need not remember, and says whose turn that is. Called by every worker's housekeeper."""

from __future__ import annotations

from sqlalchemy import delete, select

from service.ledger.clock import now
from service.ledger.database import Transaction, writes
from service.ledger.idempotency import IDEMPOTENCY_S
from service.ledger.states import FINAL_JOB_STATES
from service.ledger.tables import Chore, Event, IdempotencyKey, Job

#: Progress of jobs that ended this long ago is of no use to anyone.
_PROGRESS_KEPT_S = 7 * 24 * 3600.0


@writes
def take_chore(tx: Transaction, name: str, every_s: float) -> bool:
    """Return whether the caller is to do a chore now: nobody began it within `every_s`, and nobody else is told so."""
    begun = (
        tx.insert(Chore)
        .values(name=name, begun_at=now())
        .on_conflict_do_update(index_elements=["name"], set_={"begun_at": now()}, where=Chore.begun_at < now(-every_s))
        .returning(Chore.name)
    )
    return tx.connection.execute(begun).first() is not None


@writes
def prune(tx: Transaction) -> None:
    """Forget old idempotency keys and the progress events of jobs long ended; states and results stay."""
    tx.connection.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < now(-IDEMPOTENCY_S)))
    ended = select(Job.id).where(Job.state.in_(FINAL_JOB_STATES), Job.finalized_at < now(-_PROGRESS_KEPT_S))
    tx.connection.execute(delete(Event).where(Event.kind == "progress", Event.job_id.in_(ended)))
