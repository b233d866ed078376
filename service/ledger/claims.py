"""Claims: who may run a step, and how long.

Called by `workers.runner`, `workers.keeper` and the sweep of `workers.process`. Each function is one transaction. Every
write after the claim is fenced by the claim's token: when the lease was lost, `LeaseLost` is raised and nothing is
written. What an attempt yields is recorded by `service.ledger.results`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, and_, insert, select, update

from service.devices import PHONE_CLASS
from service.errors import EdgeKilnError, LeaseLost, Parked, StepLost
from service.ledger import locks
from service.ledger.blobs import OutputFile
from service.ledger.clock import now
from service.ledger.database import Transaction, asks, reads, writes
from service.ledger.devices import find_steps_for_device
from service.ledger.due import (
    find_due_steps,
    is_class_due,
    is_due,
    is_running,
    is_step_made_by,
    read_running,
    select_due,
    take_turn,
)
from service.ledger.events import emit
from service.ledger.fleet import read_claimants, select_claiming_slots
from service.ledger.moves import announce, close_attempt, live_job_ids, move_step, recompute_job, settle
from service.ledger.quotas import require_slot
from service.ledger.replan import plan_anew
from service.ledger.states import AttemptState, DeviceState, StepEvent, StepState
from service.ledger.tables import Attempt, Device, Step, StepInput, StepOutput

#: How many times a worker's own lease another's may last, whose settings may differ.
_FAR = 20


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
    #: The jobs that want it, with the trace contexts of their submissions.
    traceparents: Mapping[str, str | None] = field(default_factory=dict)


@writes
def claim_next(tx: Transaction, worker_id: str, resource_class: str, policy: LeasePolicy) -> Claim | None:
    """Claim the next due step of a class that this worker's host may run now; None when there is none.

    Due is what is queued, and what runs under an expired lease. Whose step is next, `service.ledger.due` says.
    """
    locks.lock_host_of(tx, worker_id)
    worker, others = read_claimants(tx.connection, worker_id)
    if worker.draining_at is not None:
        return None
    running = read_running(tx.connection, worker.host_id)
    if not _has_room(tx, worker, others, running, resource_class, policy):
        return None
    due = find_due_steps(tx, resource_class, worker, others, running)
    for step_id in due:
        held = locks.lock_step_with_jobs(tx, step_id)
        if _end_hopeless(tx, held, policy) or not held.is_due:
            continue
        if not is_step_made_by(worker, held.row) and plan_anew(tx, held):
            continue
        # Locks the tenant: no further candidate is looked at after it.
        require_slot(tx, held.row.tenant_id, held.row.max_running_steps)
        claim = _take(tx, held, worker_id, policy.lease_s)
        if claim is not None:
            if len(due) > 1:
                # One wake-up, one step: whoever claims one of several wakes the next.
                tx.due_classes.add(resource_class)
            take_turn(tx, claim.tenant_id, resource_class)
            return claim
    return None


@writes
def claim_for_device(tx: Transaction, worker_id: str, device_id: str, policy: LeasePolicy) -> Claim | None:
    """Claim the next due step that a phone fits, which this worker follows; None when there is none.

    The step's lease is the phone's: while it stands nothing else is claimed for that phone.
    """
    locks.lock_device(tx, device_id)
    worker, _ = read_claimants(tx.connection, worker_id)
    device = tx.connection.execute(
        select(Device.__table__).where(
            Device.id == device_id, Device.worker_id == worker_id, Device.state == DeviceState.READY
        )
    ).one_or_none()
    if device is None or worker.draining_at is not None or not _is_free(tx, device_id, policy):
        return None
    for step_id in find_steps_for_device(tx, device):
        held = locks.lock_step_with_jobs(tx, step_id)
        if _end_hopeless(tx, held, policy) or not held.is_due:
            continue
        # Locks the tenant: no further candidate is looked at after it.
        require_slot(tx, held.row.tenant_id, held.row.max_running_steps)
        claim = _take(tx, held, worker_id, policy.lease_s, device_id)
        if claim is not None:
            take_turn(tx, claim.tenant_id, PHONE_CLASS)
            return claim
    return None


def _is_free(tx: Transaction, device_id: str, policy: LeasePolicy) -> bool:
    """Whether no step holds a phone. One whose worker vanished lets go: it is ended, or due for any phone."""
    holder_id = tx.connection.execute(
        select(Step.id).where(Step.device_id == device_id, is_running())
    ).scalar_one_or_none()
    if holder_id is None:
        return True
    held = locks.lock_step_with_jobs(tx, holder_id)
    if not held.row.is_expired:
        return False
    if not _end_hopeless(tx, held, policy):
        # Nothing was measured yet. It gives the phone back, and keeps its place among what is due.
        is_it = Step.id == holder_id, Step.token == held.row.token
        tx.connection.execute(update(Step).where(*is_it).values(device_id=None))
    return True


def _has_room(
    tx: Transaction,
    worker: Any,
    others: Iterable[Any],
    running: Sequence[Any],
    resource_class: str,
    policy: LeasePolicy,
) -> bool:
    """Whether a step of this class may start here: slots of the worker, and a benchmark has the host to itself."""
    mine = sum(row.number for row in running if row.resource_class == resource_class and row.worker_id == worker.id)
    if mine >= worker.slots.get(resource_class, 0):
        return False
    if resource_class == "device":
        return not running
    if any(row.resource_class == "device" for row in running):
        return False
    # A benchmark that has waited long enough holds other work back where it can run, until that host is idle.
    neighbours = [other for other in others if other.host_id == worker.host_id and other.is_claiming]
    if not any(other.slots.get("device", 0) > 0 for other in neighbours):
        return True
    impatient = select_due("device", Step.queued_at < now(-policy.benchmark_patience_s))
    return tx.connection.execute(impatient.limit(1)).first() is None


def _end_hopeless(tx: Transaction, held: locks.HeldStep, policy: LeasePolicy) -> bool:
    """End a step whose holder vanished and which must not be taken over; return whether it was ended."""
    row = held.row
    if not row.is_expired:
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
    close_attempt(tx, row.id, row.token, AttemptState.LOST, error=error.to_json())
    move_step(tx, row.id, StepEvent.FAIL, token=row.token, error=error.to_json())
    settle(tx, row.id)
    return True


def _take(
    tx: Transaction, held: locks.HeldStep, worker_id: str, lease_s: float, device_id: str | None = None
) -> Claim | None:
    step = held.row
    if not move_step(
        tx,
        step.id,
        StepEvent.CLAIM,
        only_if=is_due(),
        token=step.token,
        next_token=step.token + 1,
        worker_id=worker_id,
        device_id=device_id,
        lease_expires_at=now(lease_s),
        run_after=None,
        pinned_at=None,
        progress=None,
        **({"loss_count": Step.loss_count + 1} if step.is_expired else {}),
    ):
        return None
    if step.is_expired:
        lost = StepLost("The lease ran out: the worker died or could not reach the ledger.").to_json()
        close_attempt(tx, step.id, step.token, AttemptState.LOST, error=lost)
    tx.connection.execute(
        insert(Attempt).values(
            step_id=step.id,
            token=step.token + 1,
            worker_id=worker_id,
            state=AttemptState.RUNNING,
            started_at=now(),
        )
    )
    announce(tx, held.live_job_ids, step.id, step.kind, StepState.RUNNING, step.error)
    for job_id in held.live_job_ids:
        recompute_job(tx, job_id)
    return _describe_claim(tx.connection, held, worker_id)


def _describe_claim(connection: Connection, held: locks.HeldStep, worker_id: str) -> Claim:
    """Return the hold on a step that was just taken, from its row as it was before."""
    step = held.row
    return Claim(
        step_id=step.id,
        token=step.token + 1,
        worker_id=worker_id,
        tenant_id=step.tenant_id,
        kind=step.kind,
        key=step.key,
        params=step.params,
        resource_class=step.resource_class,
        predicted_peak_anon_bytes=step.predicted_peak_anon_bytes,
        toolchain_id=step.toolchain_id,
        revision=step.revision,
        job_id=None if step.shared else step.job_id,
        inputs=_read_inputs(connection, step.id),
        traceparents=held.traceparents,
    )


def _read_inputs(connection: Connection, step_id: str) -> dict[str, ClaimInput]:
    rows = connection.execute(
        select(StepInput.name, Step.id, Step.kind, Step.key, Step.params, Step.figures)
        .join(Step, Step.id == StepInput.input_id)
        .where(StepInput.step_id == step_id)
        .order_by(StepInput.name)
    ).all()
    outputs: dict[str, list[OutputFile]] = defaultdict(list)
    if rows:
        for row in connection.execute(
            select(StepOutput.step_id, StepOutput.name, StepOutput.digest, StepOutput.size_bytes)
            .where(StepOutput.step_id.in_({row.id for row in rows}))
            .order_by(StepOutput.step_id, StepOutput.name)
        ):
            outputs[row.step_id].append(OutputFile(row.name, row.digest, row.size_bytes))
    return {
        row.name: ClaimInput(row.id, row.kind, row.key, row.params, row.figures or {}, tuple(outputs[row.id]))
        for row in rows
    }


@writes
def extend_lease(tx: Transaction, claim: Claim, lease_s: float) -> None:
    """Hold on for another `lease_s` seconds; raises `LeaseLost`."""
    _fenced(tx, claim, lease_expires_at=now(lease_s))


@asks
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
    held = locks.lock_step_with_jobs(tx, claim.step_id)
    if held.row.pinned_at is not None:
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
def shorten_leases(tx: Transaction, policy: LeasePolicy) -> None:
    """Let no lease end much later than leases do.

    One does when the database's clock has gone back; what a dead worker held would wait until the clock is there again.
    Who holds a step extends its lease as always.
    """
    too_late = now(_FAR * policy.lease_s)
    tx.connection.execute(
        update(Step).where(is_running(), Step.lease_expires_at > too_late).values(lease_expires_at=now(policy.lease_s))
    )


@writes
def end_hopeless_steps(tx: Transaction, policy: LeasePolicy) -> None:
    """End the steps whose workers vanished and that nobody may take over."""
    statement = select(Step.id).where(is_running(), Step.lease_expires_at <= now())
    # Sorted here: asked for this order, SQLite reads every step there is by its primary key.
    for step_id in sorted(tx.connection.execute(statement).scalars()):
        _end_hopeless(tx, locks.lock_step_with_jobs(tx, step_id), policy)
