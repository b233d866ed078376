"""How much there is of what, over all tenants: what an operator watches. Reads only; called by `service.metrics`.

What is unfinished is counted at each call, from indexes that hold nothing else. Totals of all that ever was are sums
over whole tables: they are a document of their own, which the caller keeps for a while.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, func, literal_column, select

from service.ledger.clock import now
from service.ledger.database import reads
from service.ledger.fleet import is_live
from service.ledger.states import StepState
from service.ledger.tables import Blob, Job, JobStep, Step, Worker

# Written into the statements, as in the indexes' own conditions.
_WAITING: ColumnElement[str] = literal_column(f"'{StepState.WAITING}'")
_QUEUED: ColumnElement[str] = literal_column(f"'{StepState.QUEUED}'")
_RUNNING: ColumnElement[str] = literal_column(f"'{StepState.RUNNING}'")


@dataclass(frozen=True)
class Counts:
    """What the ledger holds at one moment."""

    #: Unfinished steps by (resource class, state).
    steps: Mapping[tuple[str, str], int]
    #: Age of the oldest queued step by resource class, in seconds.
    oldest_queued_s: Mapping[str, float]
    #: Unfinished jobs by state.
    jobs: Mapping[str, int]
    #: Workers heard of lately.
    workers: int


@dataclass(frozen=True)
class Totals:
    """What the ledger has come to hold."""

    #: Steps that jobs joined instead of making their own.
    reused: int
    blobs: int
    blob_bytes: int


@reads
def read_counts(connection: Connection) -> Counts:
    """Count what is unfinished."""
    due = connection.execute(
        select(Step.resource_class, Step.state, func.count(), func.min(Step.queued_at), now())
        .where(Step.state.in_([_QUEUED, _RUNNING]))
        .group_by(Step.resource_class, Step.state)
    ).all()
    waiting = connection.execute(
        select(Step.resource_class, func.count()).where(Step.state == _WAITING).group_by(Step.resource_class)
    )
    jobs = connection.execute(select(Job.state, func.count()).where(Job.finalized_at.is_(None)).group_by(Job.state))
    workers = select(func.count()).select_from(Worker).where(is_live())
    return Counts(
        steps={
            **{(resource_class, str(state)): count for resource_class, state, count, *_ in due},
            **{(resource_class, str(StepState.WAITING)): count for resource_class, count in waiting},
        },
        oldest_queued_s={
            resource_class: max(0.0, (read_at - oldest).total_seconds())
            for resource_class, state, _, oldest, read_at in due
            if state == StepState.QUEUED and oldest is not None
        },
        jobs={str(state): count for state, count in jobs},
        workers=connection.execute(workers).scalar_one(),
    )


@reads
def read_totals(connection: Connection) -> Totals:
    """Add up what there is; takes longer the more there is."""
    reused = select(func.count()).select_from(JobStep).where(JobStep.reused)
    blobs = select(func.count(), func.coalesce(func.sum(Blob.size_bytes), 0)).where(Blob.swept_at.is_(None))
    number, size_bytes = connection.execute(blobs).one()
    return Totals(connection.execute(reused).scalar_one(), number, int(size_bytes))
