"""Row locks, in one order: host, jobs by id, steps by id, tenant, blobs by digest.

Without them two inputs that finish at the same instant each see the other as unfinished and strand their dependent.
The locks are `FOR NO KEY UPDATE`, so that a row that merely refers to a locked one can still be written. SQLite has one
writer at a time (`BEGIN IMMEDIATE`) and needs none of this.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import select

from service.ledger.database import StaleView, Transaction
from service.ledger.tables import Blob, Host, Job, JobStep, Step, Tenant


def lock_host(tx: Transaction, host_id: str) -> None:
    """Let one worker of a host claim at a time."""
    if tx.is_postgresql:
        tx.connection.execute(select(Host.id).where(Host.id == host_id).with_for_update(key_share=True))


def lock_jobs(tx: Transaction, job_ids: Iterable[str]) -> None:
    """Lock jobs in id order."""
    if tx.is_postgresql:
        tx.connection.execute(
            select(Job.id).where(Job.id.in_(sorted(job_ids))).order_by(Job.id).with_for_update(key_share=True)
        )


def lock_steps(tx: Transaction, step_ids: Iterable[str]) -> None:
    """Lock steps in id order, after their jobs."""
    if tx.is_postgresql:
        tx.connection.execute(
            select(Step.id).where(Step.id.in_(sorted(step_ids))).order_by(Step.id).with_for_update(key_share=True)
        )


def lock_tenant(tx: Transaction, tenant_id: str) -> None:
    """Let one transaction at a time count against a tenant's quota."""
    if tx.is_postgresql:
        tx.connection.execute(select(Tenant.id).where(Tenant.id == tenant_id).with_for_update(key_share=True))


def lock_blobs(tx: Transaction, digests: Iterable[str]) -> None:
    """Lock blobs in digest order, last of all."""
    if tx.is_postgresql:
        tx.connection.execute(
            select(Blob.digest)
            .where(Blob.digest.in_(sorted(digests)))
            .order_by(Blob.digest)
            .with_for_update(key_share=True)
        )


def lock_step_with_jobs(tx: Transaction, step_id: str) -> tuple[str, ...]:
    """Lock every job that links to a step, then the step; return the jobs' ids.

    A job that joins the step in between is seen when the step's lock is held, and the transaction starts anew.
    """
    before = linked_job_ids(tx, step_id)
    lock_jobs(tx, before)
    lock_steps(tx, [step_id])
    if linked_job_ids(tx, step_id) != before:
        raise StaleView
    return before


def linked_job_ids(tx: Transaction, step_id: str) -> tuple[str, ...]:
    """Ids of all jobs that link to a step, sorted."""
    rows = tx.connection.execute(select(JobStep.job_id).where(JobStep.step_id == step_id).order_by(JobStep.job_id))
    return tuple(rows.scalars())
