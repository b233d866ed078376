"""What the ledger gives up: old jobs, steps that nobody has used for long, and blobs that nothing refers to.

Decides; `service.sweep` carries out. A job goes with its rows, if a policy says so. A blob goes in three moves, each a
transaction: its step is retired, so that nobody joins it; the blob is condemned, so that no commit counts on it; and
after a wait its bytes are deleted under the row's lock, if still nothing refers to it. The row stays: it says which
bytes a step had made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, false, func, literal, or_, select, text, update
from sqlalchemy.orm import aliased

from service.ledger import locks
from service.ledger.clock import now
from service.ledger.database import Database, Transaction, reads, writes
from service.ledger.states import FINAL_JOB_STATES, FINAL_STEP_STATES, LIVE_STEP_STATES, StepState
from service.ledger.tables import (
    Attempt,
    Blob,
    Job,
    JobStep,
    JobUpload,
    Publication,
    ResumableUpload,
    ScheduleUpload,
    Step,
    StepInput,
    StepOutput,
    ToolFile,
    Upload,
    UploadPart,
    VariantStep,
)

#: Rows that one transaction takes.
_BATCH = 500


@dataclass(frozen=True)
class Retention:
    """How long things are kept, in seconds; `math.inf`: for ever. See `service.settings.Settings`."""

    #: Outputs that are only kept for reuse, since they were last used.
    outputs_s: float
    #: Uploads that no job and no schedule names, since they were last uploaded.
    uploads_s: float
    #: Jobs that published nothing, since they ended.
    unpublished_jobs_s: float
    #: Jobs that published artifacts, with these, since they ended.
    published_jobs_s: float
    #: Condemned blobs, and steps that a worker may not yet know to be over; longer than any step may take.
    wait_s: float


@dataclass(frozen=True)
class BlobRow:
    """A blob as the sweep sees it."""

    digest: str
    size_bytes: int
    #: Kind of a step that made it, or `log`; None for an upload, or what no step has made.
    kind: str | None
    is_condemned: bool


@reads
def read_expired_jobs(
    connection: Connection, retention: Retention, limit: int | None = _BATCH
) -> list[tuple[str, str]]:
    """Return id and tenant of jobs that are kept no longer, the oldest first."""
    expired = select(Job.id, Job.tenant_id).where(_is_expired(retention)).order_by(Job.finalized_at, Job.id)
    return [(row.id, row.tenant_id) for row in connection.execute(expired.limit(limit))]


@writes
def forget_orphans(tx: Transaction, wait_s: float) -> int:
    """Forget steps of removed jobs that nobody can join, with their logs; return how many were forgotten in part.

    What another step was made from keeps its row: the other's provenance needs it.
    """
    has_dependent = exists(StepInput.step_id).where(StepInput.input_id == Step.id).correlate(Step)
    has_attempt = exists(Attempt.token).where(Attempt.step_id == Step.id).correlate(Step)
    orphans = select(Step.id).where(_is_forgotten(None, wait_s), or_(~has_dependent, has_attempt)).limit(_BATCH)
    step_ids = list(tx.connection.execute(orphans).scalars())
    locks.lock_steps(tx, step_ids)
    tx.connection.execute(delete(Attempt).where(Attempt.step_id.in_(step_ids)))
    bare = select(Step.id).where(Step.id.in_(step_ids), ~has_dependent)
    bare_ids = list(tx.connection.execute(bare).scalars())
    for table in (StepInput, StepOutput, VariantStep):
        tx.connection.execute(delete(table).where(table.step_id.in_(bare_ids)))
    tx.connection.execute(delete(Step).where(Step.id.in_(bare_ids)))
    return len(step_ids)


@writes
def retire_unused_steps(tx: Transaction, keep_s: float) -> int:
    """Let nobody join the shared steps that no job has used for `keep_s`; return how many there were.

    Jobs link whole chains, so a step is never used longer ago than what was made from it: nothing that stays was made
    from anything that goes, save from a `fetch`, whose content stands in the keys.
    """
    step_ids = list(tx.connection.execute(select(Step.id).where(_is_unused(keep_s)).limit(_BATCH)).scalars())
    # A job that joins holds the step's lock: it is seen here, or it sees the step retired.
    locks.lock_steps(tx, step_ids)
    retired = tx.connection.execute(
        update(Step).where(Step.id.in_(step_ids), _is_unused(keep_s)).values(retired_at=now())
    )
    return retired.rowcount


@writes
def drop_unused_uploads(tx: Transaction, keep_s: float) -> int:
    """Forget uploads that no job or schedule names and that are older than `keep_s`; return how many there were."""
    digests = list(tx.connection.execute(select(Upload.digest).where(_is_unnamed(keep_s)).limit(_BATCH)).scalars())
    # Whoever submits a job, or uploads again, holds the blob's lock.
    locks.lock_blobs(tx, digests)
    dropped = tx.connection.execute(delete(Upload).where(Upload.digest.in_(digests), _is_unnamed(keep_s)))
    return dropped.rowcount


@writes
def condemn_unreferenced(tx: Transaction) -> list[BlobRow]:
    """Condemn blobs that nothing refers to and return them; none when all are done."""
    found = _read_rows(tx.connection, and_(Blob.condemned_at.is_(None), ~_is_referenced()), _BATCH)
    digests = [row.digest for row in found]
    locks.lock_blobs(tx, digests)
    condemned = tx.connection.execute(
        update(Blob)
        .where(Blob.digest.in_(digests), Blob.condemned_at.is_(None), ~_is_referenced())
        .values(condemned_at=now())
        .returning(Blob.digest)
    )
    chosen = set(condemned.scalars())
    return [row for row in found if row.digest in chosen]


@writes
def condemn_stray(tx: Transaction, digest: str, size_bytes: int) -> bool:
    """Enter an object that no row names as a condemned blob; return False if a row names it by now."""
    inserted = tx.connection.execute(
        tx.insert(Blob)
        .values(digest=digest, size_bytes=size_bytes, created_at=now(), condemned_at=now())
        .on_conflict_do_nothing()
        .returning(Blob.digest)
    )
    return inserted.first() is not None


@writes
def delete_condemned(tx: Transaction, digest: str, wait_s: float, delete_bytes: Callable[[], None]) -> bool:
    """Delete a blob's bytes under its row's lock; return whether they are gone.

    One that something refers to after all is pardoned. A crash in between leaves a condemned row, and the next sweep
    deletes again.
    """
    if tx.is_postgresql:
        # The lock must last as long as the store takes, or whoever stores the same bytes meanwhile would lose them.
        tx.connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
    locks.lock_blobs(tx, [digest])
    is_due = Blob.digest == digest, _is_due(wait_s)
    is_referenced = tx.connection.execute(select(_is_referenced()).select_from(Blob).where(*is_due)).scalar()
    if is_referenced is None:
        return False
    if is_referenced:
        tx.connection.execute(update(Blob).where(*is_due).values(condemned_at=None))
        return False
    delete_bytes()
    tx.connection.execute(update(Blob).where(Blob.digest == digest).values(swept_at=now()))
    return True


def read_unreferenced(database: Database, retention: Retention) -> Iterator[BlobRow]:
    """Yield the blobs that would be condemned if old jobs, unused steps and uploads were given up now."""
    return _page(database, and_(Blob.condemned_at.is_(None), ~_is_referenced(retention)))


def read_due(database: Database, wait_s: float) -> Iterator[BlobRow]:
    """Yield the blobs that were condemned `wait_s` ago or earlier."""
    return _page(database, _is_due(wait_s))


def read_stored(database: Database) -> Iterator[BlobRow]:
    """Yield every blob whose bytes should be in the store, in order of their digests."""
    return _page(database, Blob.swept_at.is_(None))


@reads
def is_kept(connection: Connection, digest: str) -> bool:
    """Whether a blob is in the ledger and not condemned."""
    kept = select(Blob.digest).where(Blob.digest == digest, Blob.condemned_at.is_(None))
    return connection.execute(kept).first() is not None


def _page(database: Database, condition: ColumnElement[bool]) -> Iterator[BlobRow]:
    last = ""
    while True:
        page = database.read(partial(_read_rows, condition=and_(condition, Blob.digest > last)))
        yield from page
        if len(page) < _BATCH:
            return
        last = page[-1].digest


def _read_rows(connection: Connection, condition: ColumnElement[bool], limit: int = _BATCH) -> list[BlobRow]:
    kind = (
        select(func.min(Step.kind))
        .join(StepOutput, StepOutput.step_id == Step.id)
        .where(StepOutput.digest == Blob.digest)
        .scalar_subquery()
    )
    log = select(literal("log")).where(exists(Attempt.step_id).where(Attempt.log_digest == Blob.digest).correlate(Blob))
    rows = connection.execute(
        select(Blob.digest, Blob.size_bytes, func.coalesce(kind, log.scalar_subquery()), Blob.condemned_at)
        .where(condition)
        .order_by(Blob.digest)
        .limit(limit)
    )
    return [
        BlobRow(digest, size_bytes, kind, condemned_at is not None) for digest, size_bytes, kind, condemned_at in rows
    ]


def _is_due(wait_s: float) -> ColumnElement[bool]:
    return and_(Blob.condemned_at.is_not(None), Blob.condemned_at <= now(-wait_s), Blob.swept_at.is_(None))


def _is_unused(keep_s: float) -> ColumnElement[bool]:
    """Whether a step's bytes are kept for reuse alone, and have not been reused for `keep_s`."""
    was_used = (
        exists(select(JobStep.job_id).join(Job, Job.id == JobStep.job_id))
        .where(JobStep.step_id == Step.id, or_(Job.finalized_at.is_(None), Job.finalized_at > now(-keep_s)))
        .correlate(Step)
    )
    return and_(
        Step.shared,
        Step.state == StepState.SUCCEEDED,
        Step.retired_at.is_(None),
        Step.finalized_at <= now(-keep_s),
        ~was_used,
    )


def _is_expired(retention: Retention) -> ColumnElement[bool]:
    """Whether a job is kept no longer; one that has measured what is published goes by the rule for those."""
    measured = (
        select(VariantStep.variant_id)
        .join(JobStep, JobStep.step_id == VariantStep.step_id)
        .join(Step, Step.id == JobStep.step_id)
        .where(JobStep.job_id == Job.id, Step.kind == "benchmark", Step.state == StepState.SUCCEEDED)
        .correlate(Job)
    )
    # Two questions, each of which has its index.
    published = exists(Publication.id).where(Publication.published_at.is_not(None))
    has_published = or_(
        published.where(Publication.job_id == Job.id).correlate(Job),
        published.where(Publication.variant_id.in_(measured)).correlate(Job),
    )
    limits = ((~has_published, retention.unpublished_jobs_s), (has_published, retention.published_jobs_s))
    return and_(
        Job.state.in_(FINAL_JOB_STATES),
        or_(
            false(),
            *(and_(kind, Job.finalized_at <= now(-kept_s)) for kind, kept_s in limits if math.isfinite(kept_s)),
        ),
    )


def _is_forgotten(retention: Retention | None, wait_s: float) -> ColumnElement[bool]:
    """Whether a step is over for good, no job links to it and nobody can join it.

    With `retention`, as it would be once old jobs are removed and unused steps retired.
    """
    is_linked = select(JobStep.job_id).where(JobStep.step_id == Step.id)
    is_closed: ColumnElement[bool] = or_(~Step.shared, Step.retired_at.is_not(None), Step.state != StepState.SUCCEEDED)
    if retention is not None:
        is_linked = is_linked.join(Job, Job.id == JobStep.job_id).where(~_is_expired(retention))
        is_closed = or_(is_closed, _is_unused(retention.outputs_s))
    dependent = aliased(Step)
    is_needed = (
        select(StepInput.step_id)
        .join(dependent, dependent.id == StepInput.step_id)
        .where(StepInput.input_id == Step.id, dependent.state.in_(LIVE_STEP_STATES))
    )
    return and_(
        Step.state.in_(FINAL_STEP_STATES),
        Step.finalized_at <= now(-wait_s),
        is_closed,
        ~exists(is_linked.correlate(Step)),
        ~exists(is_needed.correlate(Step)),
    )


def _is_unnamed(keep_s: float, retention: Retention | None = None) -> ColumnElement[bool]:
    """Whether an upload is old, and named by no job or schedule; with `retention`, by none that would stay."""
    by_job = select(JobUpload.digest).where(JobUpload.tenant_id == Upload.tenant_id, JobUpload.digest == Upload.digest)
    if retention is not None:
        by_job = by_job.join(Job, Job.id == JobUpload.job_id).where(~_is_expired(retention))
    by_schedule = select(ScheduleUpload.digest).where(
        ScheduleUpload.tenant_id == Upload.tenant_id, ScheduleUpload.digest == Upload.digest
    )
    is_named = or_(exists(by_job.correlate(Upload)), exists(by_schedule.correlate(Upload)))
    return and_(Upload.created_at <= now(-keep_s), ~is_named)


def _is_referenced(retention: Retention | None = None) -> ColumnElement[bool]:
    """Whether anything needs a blob; with `retention`, as it would be once all that is old is given up."""
    is_given_up: ColumnElement[bool] = Step.retired_at.is_not(None)
    is_held = Upload.digest == Blob.digest
    is_published = select(Publication.id).where(Publication.digest == Blob.digest)
    is_logged = select(Attempt.step_id).where(Attempt.log_digest == Blob.digest)
    is_part = select(UploadPart.upload_id).where(UploadPart.digest == Blob.digest)
    if retention is not None:
        is_forgotten = _is_forgotten(retention, retention.wait_s)
        is_given_up = or_(is_given_up, _is_unused(retention.outputs_s), is_forgotten)
        is_held = and_(is_held, ~_is_unnamed(retention.uploads_s, retention))
        is_published = is_published.join(Job, Job.id == Publication.job_id).where(~_is_expired(retention))
        is_logged = is_logged.join(Step, Step.id == Attempt.step_id).where(~is_forgotten)
        is_part = is_part.join(ResumableUpload, ResumableUpload.id == UploadPart.upload_id).where(
            ResumableUpload.expires_at > now()
        )
    is_wanted = (
        exists(select(JobStep.job_id).join(Job, Job.id == JobStep.job_id))
        .where(JobStep.step_id == Step.id, Job.state.not_in(FINAL_JOB_STATES))
        .correlate(Step)
    )
    by_steps = exists(select(StepOutput.step_id).join(Step, Step.id == StepOutput.step_id)).where(
        StepOutput.digest == Blob.digest, or_(~is_given_up, is_wanted)
    )
    return or_(
        by_steps.correlate(Blob),
        exists(is_published.correlate(Blob)),
        exists(is_logged.correlate(Blob)),
        exists(is_part.correlate(Blob)),
        exists(Upload.digest).where(is_held).correlate(Blob),
        exists(ToolFile.digest).where(ToolFile.digest == Blob.digest).correlate(Blob),
    )
