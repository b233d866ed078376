"""Claims: who may run a step, and how long.

Called by `workers.runner`, `workers.keeper` and the sweep of `workers.process`. Each function is one transaction. Every
write after the claim is fenced by the claim's token: when the lease was lost, `LeaseLost` is raised and nothing is
written. What an attempt yields is recorded by `service.ledger.results`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, func, insert, select, update

from service.errors import EdgeKilnError, LeaseLost, Parked, StepLost
from service.ledger import locks
from service.ledger.blobs import OutputFile
from service.ledger.clock import now
from service.ledger.database import Transaction, reads, writes
from service.ledger.due import ABILITIES, find_due_steps, is_class_due, is_due, is_running, select_due, take_turn
from service.ledger.events import emit
from service.ledger.fleet import is_draining, select_claiming_slots
from service.ledger.moves import close_attempt, live_job_ids, move_step, settle
from service.ledger.quotas import require_slot
from service.ledger.states import AttemptState, StepEvent, StepState
from service.ledger.tables import Attempt, JobStep, Step, StepInput, StepOutput, Worker


@dataclass(frozen=True)
class LeasePolicy:
    """The numbers of claiming; see `service.settings.Settings`."""

    lease_s: float
    benchmark_patience_s: float
    max_failures: int
    max_losses: int
    retry_pause_s: float


@dataclass(frozen=True)
class ClaimInput:
    """What a claimed step may read of one input."""

    step_id: str
    kind: str
    key: str
    params: Mapping[str, Any]
    figures: Mapping[str, Any]
    outputs: tuple[OutputFile, ...]


@dataclass(frozen=True)
class Claim:
    """A timed hold on a step."""

    step_id: str
    token: int
    worker_id: str
    tenant_id: str
    kind: str
    key: str
    params: Mapping[str, Any]
    resource_class: str
    #: None where nobody predicts.
    predicted_peak_anon_bytes: int | None
    toolchain_id: str
    revision: str
    #: The job that owns it, for kinds that are not shared.
    job_id: str | None
    inputs: Mapping[str, ClaimInput]


@writes
def claim_next(tx: Transaction, worker_id: str, resource_class: str, policy: LeasePolicy) -> Claim | None:
    """Claim the next due step of a class that this worker's host may run now; None when there is none.

    Due is what is queued, and what runs under an expired lease. Whose step is next, `service.ledger.due` says.
    """
    worker = tx.connection.execute(select(*ABILITIES, Worker.host_id, Worker.slots).where(Worker.id == worker_id)).one()
    locks.lock_host(tx, worker.host_id)
    if is_draining(tx.connection, worker_id):
        return None
    if not _has_room(tx, worker_id, worker.host_id, resource_class, worker.slots.get(resource_class, 0), policy):
        return None
    due = find_due_steps(tx, resource_class, worker)
    for step_id in due:
        locks.lock_step_with_jobs(tx, step_id)
        if _end_hopeless(tx, step_id, policy):
            continue
        require_slot(tx, step_id)
        claim = _take(tx, step_id, worker_id, policy.lease_s)
        if claim is not None:
            settle(tx, step_id)
            if len(due) > 1:
                # One wake-up, one step: whoever claims one of several wakes the next.
                tx.due_classes.add(resource_class)
            take_turn(tx, claim.tenant_id, resource_class)
            return claim
    return None


def _has_room(
    tx: Transaction, worker_id: str, host_id: str, resource_class: str, slots: int, policy: LeasePolicy
) -> bool:
    """Whether a step of this class may start here: slots of the worker, and a benchmark has the host to itself."""
    running = tx.connection.execute(
        select(Step.resource_class, Step.worker_id, func.count())
        .join(Worker, Worker.id == Step.worker_id)
        .where(is_running(), Step.lease_expires_at > now(), Worker.host_id == host_id)
        .group_by(Step.resource_class, Step.worker_id)
    ).all()
    mine = sum(count for name, owner, count in running if name == resource_class and owner == worker_id)
    if mine >= slots:
        return False
    if resource_class == "device":
        return not running
    if any(name == "device" for name, _, _ in running):
        return False
    # A benchmark that has waited long enough holds other work back where it can run, until that host is idle.
    if not any(slots.get("device", 0) > 0 for slots in select_claiming_slots(tx.connection, host_id)):
        return True
    impatient = select_due("device", Step.queued_at < now(-policy.benchmark_patience_s))
    return tx.connection.execute(impatient.limit(1)).first() is None


def _end_hopeless(tx: Transaction, step_id: str, policy: LeasePolicy) -> bool:
    """End a step whose holder vanished and which must not be taken over; return whether it was ended."""
    row = tx.connection.execute(
        select(Step.kind, Step.token, Step.pinned_at, Step.loss_count).where(
            Step.id == step_id, Step.state == StepState.RUNNING, Step.lease_expires_at <= now()
        )
    ).one_or_none()
    if row is None:
        return False
    error: EdgeKilnError
    if row.pinned_at is not None:
        error = _lost_measurement(row.kind)
    elif row.loss_count + 1 >= policy.max_losses:
        error = Parked(
            f"This {row.kind} step lost {policy.max_losses} workers in a row and was given up. "
            "Look at the workers' logs, then retry the job."
        )
    else:
        return False
    close_attempt(tx, step_id, row.token, AttemptState.LOST, error=error.to_json())
    move_step(tx, step_id, StepEvent.FAIL, token=row.token, error=error.to_json())
    settle(tx, step_id)
    return True


def _take(tx: Transaction, step_id: str, worker_id: str, lease_s: float) -> Claim | None:
    before = tx.connection.execute(select(Step.state, Step.token).where(Step.id == step_id)).one()
    was_running = before.state == StepState.RUNNING
    if not move_step(
        tx,
        step_id,
        StepEvent.CLAIM,
        only_if=is_due(),
        token=before.token,
        worker_id=worker_id,
        lease_expires_at=now(lease_s),
        run_after=None,
        pinned_at=None,
        progress=None,
        **({"loss_count": Step.loss_count + 1} if was_running else {}),
    ):
        return None
    if was_running:
        lost = StepLost("The lease ran out: the worker died or could not reach the ledger.").to_json()
        close_attempt(tx, step_id, before.token, AttemptState.LOST, error=lost)
    tx.connection.execute(update(Step).where(Step.id == step_id).values(token=before.token + 1))
    tx.connection.execute(
        insert(Attempt).values(
            step_id=step_id,
            token=before.token + 1,
            worker_id=worker_id,
            state=AttemptState.RUNNING,
            started_at=now(),
        )
    )
    return _read_claim(tx.connection, step_id, worker_id)


def _read_claim(connection: Connection, step_id: str, worker_id: str) -> Claim:
    step = connection.execute(select(Step.__table__).where(Step.id == step_id)).one()
    job_id = None
    if not step.shared:
        job_id = connection.execute(select(JobStep.job_id).where(JobStep.step_id == step_id)).scalar_one()
    return Claim(
        step_id=step.id,
        token=step.token,
        worker_id=worker_id,
        tenant_id=step.tenant_id,
        kind=step.kind,
        key=step.key,
        params=step.params,
        resource_class=step.resource_class,
        predicted_peak_anon_bytes=step.predicted_peak_anon_bytes,
        toolchain_id=step.toolchain_id,
        revision=step.revision,
        job_id=job_id,
        inputs=_read_inputs(connection, step_id),
    )


def _read_inputs(connection: Connection, step_id: str) -> dict[str, ClaimInput]:
    inputs = {}
    for row in connection.execute(
        select(StepInput.name, Step.id, Step.kind, Step.key, Step.params, Step.figures)
        .join(Step, Step.id == StepInput.input_id)
        .where(StepInput.step_id == step_id)
        .order_by(StepInput.name)
    ).all():
        outputs = connection.execute(
            select(StepOutput.name, StepOutput.digest, StepOutput.size_bytes)
            .where(StepOutput.step_id == row.id)
            .order_by(StepOutput.name)
        )
        files = tuple(OutputFile(*output) for output in outputs)
        inputs[row.name] = ClaimInput(row.id, row.kind, row.key, row.params, row.figures or {}, files)
    return inputs


@writes
def extend_lease(tx: Transaction, claim: Claim, lease_s: float) -> None:
    """Hold on for another `lease_s` seconds; raises `LeaseLost`."""
    _fenced(tx, claim, lease_expires_at=now(lease_s))


@reads
def is_held(connection: Connection, claim: Claim) -> bool:
    """Whether the claim still stands; False as soon as the step was cancelled or taken over."""
    return (
        connection.execute(
            select(Step.id).where(Step.id == claim.step_id, Step.token == claim.token, Step.state == StepState.RUNNING)
        ).first()
        is not None
    )


@writes
def pin_attempt(tx: Transaction, claim: Claim) -> None:
    """Mark the point after which the attempt must never be repeated by itself; raises `LeaseLost`."""
    _fenced(tx, claim, pinned_at=now())


@writes
def report_progress(tx: Transaction, claim: Claim, message: str, fraction: float | None) -> None:
    """Store and announce how far a step is; raises `LeaseLost`."""
    job_ids = live_job_ids(tx, claim.step_id)
    locks.lock_jobs(tx, job_ids)
    progress = {"message": message, "fraction": fraction}
    _fenced(tx, claim, progress=progress)
    emit(tx, job_ids, "progress", {"step_id": claim.step_id, "kind": claim.kind, **progress})


@writes
def report_log(tx: Transaction, claim: Claim, text: str, size_bytes: int) -> None:
    """Store the end of what an attempt has printed so far, `size_bytes` in all; nothing once it has ended."""
    tx.connection.execute(
        update(Attempt)
        .where(Attempt.step_id == claim.step_id, Attempt.token == claim.token, Attempt.state == AttemptState.RUNNING)
        .values(live_log=text, live_log_bytes=size_bytes)
    )


def _fenced(tx: Transaction, claim: Claim, **values: Any) -> None:
    held = and_(Step.id == claim.step_id, Step.token == claim.token, Step.state == StepState.RUNNING)
    if tx.connection.execute(update(Step).where(held).values(**values)).rowcount != 1:
        raise LeaseLost(f"The {claim.kind} step {claim.step_id} is no longer held by this worker.")


@writes
def release_step(tx: Transaction, claim: Claim) -> None:
    """Give a step back unharmed (the worker shuts down); never counted against it. No error when it is lost.

    A measurement that had begun is not repeated by itself: it ends as lost.
    """
    locks.lock_step_with_jobs(tx, claim.step_id)
    pinned_at = tx.connection.execute(select(Step.pinned_at).where(Step.id == claim.step_id)).scalar_one()
    if pinned_at is not None:
        error = _lost_measurement(claim.kind).to_json()
        if move_step(tx, claim.step_id, StepEvent.FAIL, token=claim.token, error=error):
            close_attempt(tx, claim.step_id, claim.token, AttemptState.LOST, error=error)
            settle(tx, claim.step_id)
    elif move_step(tx, claim.step_id, StepEvent.RELEASE, token=claim.token, progress=None):
        close_attempt(tx, claim.step_id, claim.token, AttemptState.RELEASED)
        settle(tx, claim.step_id)


def _lost_measurement(kind: str) -> StepLost:
    return StepLost(
        f"The worker ended while this {kind} was being measured. A measurement is never repeated by itself; "
        "retry the job to measure again."
    )


@reads
def due_classes(connection: Connection) -> list[str]:
    """Return the resource classes with due work that some live worker has slots for and may claim."""
    served = {name for slots in select_claiming_slots(connection) for name, count in slots.items() if count > 0}
    return [name for name in sorted(served) if is_class_due(connection, name)]


@writes
def end_hopeless_steps(tx: Transaction, policy: LeasePolicy) -> None:
    """End the steps whose workers vanished and that nobody may take over."""
    statement = select(Step.id).where(is_running(), Step.lease_expires_at <= now())
    # Sorted here: asked for this order, SQLite reads every step there is by its primary key.
    for step_id in sorted(tx.connection.execute(statement).scalars()):
        locks.lock_step_with_jobs(tx, step_id)
        _end_hopeless(tx, step_id, policy)
