"""What users do to jobs: submit, cancel, retry, remove. Each is one transaction.

Called by `service.api`. Changes states only through `service.ledger.moves`.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import delete, or_, select, update

from service import gates
from service.errors import Conflict, InvalidRequest, NotFound
from service.ledger import locks, views
from service.ledger.bulk import insert_together
from service.ledger.clock import now
from service.ledger.database import Transaction, writes
from service.ledger.events import emit
from service.ledger.graph import describe_first_step
from service.ledger.idempotency import Submission, claim_idempotency_key
from service.ledger.keys import digest_json, new_id
from service.ledger.moves import drop_unwanted_steps, recompute_job
from service.ledger.plan import expand_submitted
from service.ledger.quotas import require_room_for_job
from service.ledger.replan import begin_again, supersede_unfinished
from service.ledger.states import FINAL_JOB_STATES, JobState, StepState, VariantState
from service.ledger.tables import (
    Event,
    IdempotencyKey,
    Job,
    JobStep,
    JobUpload,
    Publication,
    ScheduleTick,
    Step,
    Variant,
    VariantStep,
)
from service.ledger.uploads import hold_uploads
from service.requests import JobRequest, parse_stored_request


@writes
def submit_job(
    tx: Transaction,
    tenant_id: str,
    request: JobRequest,
    *,
    max_variants: int,
    idempotency_key: str | None = None,
    traceparent: str | None = None,
) -> Submission:
    """Store a job with its variants and first step; the caller has checked the source's folder.

    Raises `InvalidRequest` for too large a matrix, `QuotaExceeded`, `UploadNotFound` for a digest that is not the
    tenant's, and `IdempotencyMismatch` when the key was used for another.
    """
    require_few_variants(request, max_variants)
    job_id = new_id("job")
    if idempotency_key is not None:
        digest = digest_json(request.to_asked())
        earlier = claim_idempotency_key(tx, tenant_id, idempotency_key, digest, job_id)
        if earlier is not None:
            return Submission(earlier, is_new=False)
    document = add_job(tx, tenant_id, request, max_variants=max_variants, job_id=job_id, traceparent=traceparent)
    return Submission(job_id, is_new=True, document=document)


def add_job(
    tx: Transaction,
    tenant_id: str,
    request: JobRequest,
    *,
    max_variants: int,
    job_id: str | None = None,
    traceparent: str | None = None,
) -> dict[str, Any]:
    """Do the same in a transaction of the caller's, and return the job whole; `service.ledger.schedules` does."""
    require_few_variants(request, max_variants)
    at = require_room_for_job(tx, tenant_id)
    job_id = job_id or new_id("job")
    owner = {"tenant_id": tenant_id, "job_id": job_id}
    (spec,) = expand_submitted(request)
    step = describe_first_step(tenant_id, request.priority, spec, at)
    events = [
        ("job", {"state": JobState.QUEUED}),
        (
            "step",
            {"step_id": step["id"], "kind": spec.kind, "state": step["state"], "reused": False, "error": None},
        ),
    ]
    job = {
        "id": job_id,
        "tenant_id": tenant_id,
        "request": request.to_json(),
        "state": JobState.QUEUED,
        "priority": request.priority,
        "traceparent": traceparent,
        "event_count": len(events),
        "created_at": at,
    }
    variants = [
        {
            "id": new_id("var"),
            **owner,
            "position": position,
            "name": name,
            "engine": engine,
            "recipe": recipe,
            "state": VariantState.PENDING,
            "created_at": at,
        }
        for position, (name, (engine, recipe)) in enumerate(request.variant_names.items())
    ]
    insert_together(
        tx,
        (Job, [job]),
        (Variant, variants),
        (Step, [step]),
        (
            JobStep,
            [{"job_id": job_id, "step_id": step["id"], "position": 0, "reused": False, "superseded": False}],
        ),
        (
            Event,
            [
                {**owner, "number": number, "kind": kind, "data": data, "created_at": at}
                for number, (kind, data) in enumerate(events, start=1)
            ],
        ),
    )
    hold_uploads(tx, tenant_id, request.held_uploads, JobUpload, job_id=job_id)
    tx.due_classes.add(spec.resource_class)
    return views.describe_new_job(job, variants, step)


def require_few_variants(request: JobRequest, max_variants: int) -> None:
    """Raise `InvalidRequest` for too large a matrix."""
    count = len(request.variant_names)
    if count > max_variants:
        raise InvalidRequest(
            f"The job asks for {count} variants; one job may have {max_variants}. Split it.",
            variants=count,
            limit=max_variants,
        )


@writes
def cancel_job(tx: Transaction, tenant_id: str, job_id: str) -> bool:
    """Cancel a job and every step that only it wants; return False when it was cancelled already.

    Raises `NotFound`, and `Conflict` when the job has ended otherwise.
    """
    state = _lock_job(tx, tenant_id, job_id).state
    if state == JobState.CANCELLED:
        return False
    if state in FINAL_JOB_STATES:
        raise Conflict(f"Job {job_id} has already ended ({state}); there is nothing to cancel.", state=state)
    tx.connection.execute(
        update(Variant)
        .where(Variant.job_id == job_id, Variant.state.in_([VariantState.PENDING, VariantState.RUNNING]))
        .values(state=VariantState.CANCELLED, finalized_at=now())
    )
    tx.connection.execute(update(Job).where(Job.id == job_id).values(state=JobState.CANCELLED, finalized_at=now()))
    emit(tx, [job_id], "job", {"state": JobState.CANCELLED})
    drop_unwanted_steps(tx, job_id)
    return True


@writes
def retry_job(tx: Transaction, tenant_id: str, job_id: str) -> None:
    """Open an ended job again for the variants that did not succeed.

    Work that succeeded is kept. A checkpoint whose plan succeeded is planned again; otherwise the source is
    looked at afresh. Raises `NotFound`, `Conflict` when the job is live or has nothing to retry, and `QuotaExceeded`.
    """
    job = _lock_job(tx, tenant_id, job_id)
    if job.state not in FINAL_JOB_STATES:
        raise Conflict(f"Job {job_id} is {job.state}; only an ended job can be retried.", state=job.state)
    if job.state == JobState.SUCCEEDED:
        raise Conflict(f"Job {job_id} succeeded; there is nothing to retry.", state=job.state)
    require_room_for_job(tx, tenant_id)
    request = parse_stored_request(job.request)
    tx.connection.execute(
        update(Variant)
        .where(Variant.job_id == job_id, Variant.state != VariantState.SUCCEEDED)
        .values(state=VariantState.PENDING, error=None, finalized_at=None)
    )
    steps = supersede_unfinished(tx, job_id, measures_again=gates.needs_benchmark(request.gates))
    tx.connection.execute(update(Job).where(Job.id == job_id).values(state=JobState.QUEUED, finalized_at=None))
    emit(tx, [job_id], "job", {"state": JobState.QUEUED})
    begin_again(tx, job_id, request, keeps_checkpoint=steps.get("plan") == StepState.SUCCEEDED)
    recompute_job(tx, job_id)


@writes
def remove_job(tx: Transaction, tenant_id: str, job_id: str) -> None:
    """Forget an ended job: its variants, events, logs and publications; the sweep frees what nobody else needs.

    Raises `NotFound`, and `Conflict` while the job is live.
    """
    state = _lock_job(tx, tenant_id, job_id).state
    if state not in FINAL_JOB_STATES:
        raise Conflict(f"Job {job_id} is {state}; cancel it (`edgekiln cancel {job_id}`), then delete it.", state=state)
    links = select(JobStep.step_id).where(JobStep.job_id == job_id).order_by(JobStep.step_id)
    # Whoever settles one of its steps has read who links to it.
    locks.lock_steps(tx, tx.connection.execute(links).scalars().all())
    tx.connection.execute(update(ScheduleTick).where(ScheduleTick.job_id == job_id).values(job_id=None))
    variant_ids = select(Variant.id).where(Variant.job_id == job_id)
    # A benchmark may serve the variant of another job too, whose artifact it measured.
    own_steps = links.join(Step, Step.id == JobStep.step_id).where(~Step.shared)
    is_served = or_(VariantStep.variant_id.in_(variant_ids), VariantStep.step_id.in_(own_steps.order_by(None)))
    tx.connection.execute(delete(VariantStep).where(is_served))
    for table in (Publication, Event, JobUpload, IdempotencyKey, JobStep, Variant):
        tx.connection.execute(delete(table).where(table.job_id == job_id))
    tx.connection.execute(delete(Job).where(Job.id == job_id))


def _lock_job(tx: Transaction, tenant_id: str, job_id: str) -> Any:
    is_it = select(Job.state, Job.request).where(Job.id == job_id, Job.tenant_id == tenant_id)
    # Another tenant's is not even locked: whoever asked would wait for its work.
    if tx.connection.execute(is_it).first() is not None:
        locks.lock_jobs(tx, [job_id])
    row = tx.connection.execute(is_it).one_or_none()
    if row is None:
        raise NotFound(f"There is no job {job_id!r}. `edgekiln jobs` lists those there are.", job_id=job_id)
    return row
