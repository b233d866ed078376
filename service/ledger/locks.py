"""Row locks, in one order: host or device, jobs by id, steps by id, tenant, upload in pieces, blobs by digest.

Without them two inputs that finish at the same instant each see the other as unfinished and strand their dependent.
The locks are `FOR NO KEY UPDATE`, so that a row that merely refers to a locked one can still be written. SQLite has one
writer at a time (`BEGIN IMMEDIATE`) and needs none of this.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, bindparam, select

from service.ledger.clock import now
from service.ledger.database import StaleView, Transaction
from service.ledger.states import FINAL_JOB_STATES, StepState
from service.ledger.tables import Blob, Device, Host, Job, JobStep, ResumableUpload, Step, Tenant, Worker


def _select_locked(column: Any) -> Any:
    """Return the statement that locks rows by their ids, in order."""
    return (
        select(column)
        .where(column.in_(bindparam("ids", expanding=True)))
        .order_by(column)
        .with_for_update(key_share=True)
    )


# Built once: a claim executes a dozen statements, and making them takes longer than their answers.
_HOSTS, _DEVICES, _JOBS, _STEPS, _TENANTS, _BLOBS = map(
    _select_locked, (Host.id, Device.id, Job.id, Step.id, Tenant.id, Blob.digest)
)
_HOST_OF = (
    select(Host.id)
    .where(Host.id == select(Worker.host_id).where(Worker.id == bindparam("worker")).scalar_subquery())
    .with_for_update(key_share=True)
)
_LINKED_JOBS = (
    select(Job.id)
    .where(Job.id.in_(select(JobStep.job_id).where(JobStep.step_id == bindparam("step"))))
    .order_by(Job.id)
    .with_for_update(key_share=True)
)


def lock_host_of(tx: Transaction, worker_id: str) -> None:
    """Let one worker of a host claim at a time."""
    if tx.is_postgresql:
        tx.connection.execute(_HOST_OF, {"worker": worker_id})


def lock_host(tx: Transaction, host_id: str) -> None:
    """Let no worker of a host claim meanwhile."""
    _lock(tx, _HOSTS, [host_id])


def lock_device(tx: Transaction, device_id: str) -> None:
    """Let one claim at a time be made for a device."""
    _lock(tx, _DEVICES, [device_id])


def lock_jobs(tx: Transaction, job_ids: Iterable[str]) -> None:
    """Lock jobs in id order."""
    _lock(tx, _JOBS, job_ids)


def lock_steps(tx: Transaction, step_ids: Iterable[str]) -> None:
    """Lock steps in id order, after their jobs."""
    _lock(tx, _STEPS, step_ids)


def lock_tenant(tx: Transaction, tenant_id: str) -> None:
    """Let one transaction at a time count against a tenant's quota."""
    _lock(tx, _TENANTS, [tenant_id])


def lock_resumable(tx: Transaction, upload_id: str) -> None:
    """Let no part be added to an upload, whose row will go: `FOR UPDATE`."""
    if tx.is_postgresql:
        tx.connection.execute(select(ResumableUpload.id).where(ResumableUpload.id == upload_id).with_for_update())


def lock_blobs(tx: Transaction, digests: Iterable[str]) -> None:
    """Lock blobs in digest order, last of all."""
    _lock(tx, _BLOBS, digests)


def _lock(tx: Transaction, statement: Any, ids: Iterable[str]) -> None:
    if tx.is_postgresql and (wanted := list(ids)):
        tx.connection.execute(statement, {"ids": wanted})


@dataclass(frozen=True)
class HeldStep:
    """A step whose row is locked, with all jobs that link to it."""

    #: Its columns, and `is_expired`: whether it runs under a lease that has run out; `is_paused`: whether it must wait;
    #: `max_running_steps`: its tenant's quota.
    row: Any
    #: The jobs that still want it, sorted, with the trace contexts of their submissions.
    traceparents: dict[str, str | None]

    @property
    def is_due(self) -> bool:
        """Whether it may be claimed; as long as it is locked, that stays so."""
        return bool(self.row.is_expired or (self.row.state == StepState.QUEUED and not self.row.is_paused))

    @property
    def live_job_ids(self) -> list[str]:
        """Ids of the jobs that still want it, sorted."""
        return list(self.traceparents)


_HELD_STEP = (
    select(
        Step.__table__,
        and_(Step.state == StepState.RUNNING, Step.lease_expires_at <= now()).label("is_expired"),
        and_(Step.run_after.is_not(None), Step.run_after > now()).label("is_paused"),
        Tenant.max_running_steps,
        JobStep.job_id,
        JobStep.superseded,
        Job.state.label("job_state"),
        Job.traceparent,
    )
    .join(Tenant, Tenant.id == Step.tenant_id)
    .outerjoin(JobStep, JobStep.step_id == Step.id)
    .outerjoin(Job, Job.id == JobStep.job_id)
    .where(Step.id == bindparam("step"))
    .order_by(JobStep.job_id)
)


def lock_linked_jobs(tx: Transaction, step_id: str) -> list[str] | None:
    """Lock every job that links to a step, in id order; return their ids, or None where nothing needs locks."""
    if not tx.is_postgresql:
        return None
    return list(tx.connection.execute(_LINKED_JOBS, {"step": step_id}).scalars())


def lock_step_with_jobs(tx: Transaction, step_id: str) -> HeldStep:
    """Lock every job that links to a step, then the step, and read it.

    A job that joins the step in between is seen when the step's lock is held, and the transaction starts anew.
    """
    locked = lock_linked_jobs(tx, step_id)
    lock_steps(tx, [step_id])
    rows = tx.connection.execute(_HELD_STEP, {"step": step_id}).all()
    if locked is not None and [row.job_id for row in rows if row.job_id is not None] != locked:
        raise StaleView
    wanted = {
        row.job_id: row.traceparent
        for row in rows
        if row.job_id and not row.superseded and row.job_state not in FINAL_JOB_STATES
    }
    return HeldStep(rows[0], wanted)
