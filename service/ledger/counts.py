"""How much there is of what, over all tenants: what an operator watches. Reads only; called by `service.metrics`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from service.ledger.clock import now
from service.ledger.database import reads
from service.ledger.fleet import is_live
from service.ledger.states import JobState, StepState
from service.ledger.tables import Blob, Job, JobStep, Step, Worker

_UNFINISHED_STEPS = (StepState.WAITING, StepState.QUEUED, StepState.RUNNING)
_UNFINISHED_JOBS = (JobState.QUEUED, JobState.RUNNING)


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
    #: Steps that jobs joined instead of making their own.
    reused: int
    blobs: int
    blob_bytes: int


@reads
def read_counts(connection: Connection) -> Counts:
    """Count everything at once."""
    steps = connection.execute(
        select(Step.resource_class, Step.state, func.count())
        .where(Step.state.in_(_UNFINISHED_STEPS))
        .group_by(Step.resource_class, Step.state)
    )
    read_at = connection.execute(select(now())).scalar_one()
    oldest = connection.execute(
        select(Step.resource_class, func.min(Step.queued_at))
        .where(Step.state == StepState.QUEUED)
        .group_by(Step.resource_class)
    ).all()
    jobs = connection.execute(
        select(Job.state, func.count()).where(Job.state.in_(_UNFINISHED_JOBS)).group_by(Job.state)
    )
    workers = select(func.count()).select_from(Worker).where(is_live())
    reused = select(func.count()).select_from(JobStep).where(JobStep.reused)
    blobs = select(func.count(), func.coalesce(func.sum(Blob.size_bytes), 0)).where(Blob.swept_at.is_(None))
    number, size_bytes = connection.execute(blobs).one()
    return Counts(
        steps={(resource_class, str(state)): count for resource_class, state, count in steps},
        oldest_queued_s={
            each: max(0.0, (read_at - queued_at).total_seconds()) for each, queued_at in oldest if queued_at is not None
        },
        jobs={str(state): count for state, count in jobs},
        workers=connection.execute(workers).scalar_one(),
        reused=connection.execute(reused).scalar_one(),
        blobs=number,
        blob_bytes=int(size_bytes),
    )
