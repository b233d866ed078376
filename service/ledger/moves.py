"""The only place that changes a step's state, and what follows from it in the same transaction.

A move applies one row of TRANSITIONS. `settle` then does what the move entails: dependents become due or
are cancelled, variants and jobs are recomputed from their steps, events are written. Callers hold the locks
(`service.ledger.locks`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import ColumnElement, and_, bindparam, exists, select, update
from sqlalchemy.orm import aliased

from service.errors import InputFailed
from service.ledger import locks
from service.ledger.clock import now
from service.ledger.database import Transaction
from service.ledger.events import emit
from service.ledger.outcome import StepView, judge_job, judge_variant
from service.ledger.states import (
    FINAL_JOB_STATES,
    FINAL_STEP_STATES,
    FINAL_VARIANT_STATES,
    LIVE_STEP_STATES,
    AttemptState,
    StepEvent,
    StepState,
    sources_of,
    target_of,
)
from service.ledger.tables import Attempt, Job, JobStep, Step, StepInput, Variant, VariantStep

# Built once; see `service.ledger.locks`.
_LIVE_JOBS = (
    select(JobStep.job_id)
    .join(Job, Job.id == JobStep.job_id)
    .where(JobStep.step_id == bindparam("step"), Job.state.not_in(FINAL_JOB_STATES), JobStep.superseded.is_(False))
    .order_by(JobStep.job_id)
)
_VARIANTS = (
    select(Variant.id, Variant.name, Variant.state, Job.state.label("job_state"))
    .join(Job, Job.id == Variant.job_id)
    .where(Variant.job_id == bindparam("job"))
    .order_by(Variant.position)
)
_SERVED = (
    select(VariantStep.step_id, VariantStep.variant_id)
    .join(Variant, Variant.id == VariantStep.variant_id)
    .where(Variant.job_id == bindparam("job"))
    .subquery()
)
_STEP_VIEWS = (
    select(Step.id, Step.kind, Step.state, Step.error, Step.token, JobStep.reused, _SERVED.c.variant_id)
    .join(JobStep, JobStep.step_id == Step.id)
    .outerjoin(_SERVED, _SERVED.c.step_id == Step.id)
    .where(JobStep.job_id == bindparam("job"), JobStep.superseded.is_(False))
    .order_by(JobStep.position)
)


def move_step(
    tx: Transaction,
    step_id: str,
    event: StepEvent,
    *,
    token: int | None = None,
    next_token: int | None = None,
    only_if: ColumnElement[bool] | None = None,
    **values: Any,
) -> bool:
    """Apply `event` to a step if its state allows it; return whether it did.

    `token` fences the write: a holder whose token is no longer the step's changes nothing. `next_token` is the step's
    from then on.
    """
    target = target_of(event)
    if next_token is not None:
        values.update(token=next_token)
    conditions = [Step.id == step_id, Step.state.in_(sources_of(event))]
    if token is not None:
        conditions.append(Step.token == token)
    if only_if is not None:
        conditions.append(only_if)
    if target is not StepState.RUNNING:
        values.update(lease_expires_at=None, worker_id=None)
    if target is StepState.QUEUED:
        values.update(queued_at=now())
    if target in FINAL_STEP_STATES:
        values.update(finalized_at=now())
    return tx.connection.execute(update(Step).where(and_(*conditions)).values(state=target, **values)).rowcount == 1


def close_attempt(tx: Transaction, step_id: str, token: int, state: AttemptState, **values: Any) -> None:
    """End an attempt that still runs.

    The end of its log stays where its worker has yet to store the whole, or never will: it holds the last words.
    """
    if state in (AttemptState.SUCCEEDED, AttemptState.FAILED):
        values.update(live_log=None, live_log_bytes=None)
    tx.connection.execute(
        update(Attempt)
        .where(Attempt.step_id == step_id, Attempt.token == token, Attempt.state == AttemptState.RUNNING)
        .values(state=state, finished_at=now(), **values)
    )


def settle(tx: Transaction, step_id: str) -> None:
    """Do everything that a step's new state entails for dependents, variants and the jobs that still want it."""
    job_ids = live_job_ids(tx, step_id)
    step = announce_step(tx, step_id, job_ids)
    if step.state == StepState.SUCCEEDED:
        _promote_dependents(tx, step_id)
    elif step.state in (StepState.FAILED, StepState.CANCELLED):
        _cancel_dependents(tx, step_id)
    elif step.state == StepState.QUEUED:
        tx.due_classes.add(step.resource_class)
    for job_id in job_ids:
        recompute_job(tx, job_id)


def announce_step(tx: Transaction, step_id: str, job_ids: Iterable[str]) -> Any:
    """Write a `step` event to the jobs of a step; return the step's `kind`, `state`, `error` and `resource_class`."""
    row = tx.connection.execute(
        select(Step.kind, Step.state, Step.error, Step.resource_class).where(Step.id == step_id)
    ).one()
    announce(tx, job_ids, step_id, row.kind, row.state, row.error)
    return row


def announce(
    tx: Transaction, job_ids: Iterable[str], step_id: str, kind: str, state: str, error: Mapping[str, Any] | None
) -> None:
    """Write a `step` event about a step that is known."""
    emit(tx, job_ids, "step", {"step_id": step_id, "kind": kind, "state": state, "error": error})


def _promote_dependents(tx: Transaction, input_id: str) -> None:
    """Queue every waiting dependent whose inputs have all succeeded."""
    dependents = _dependents(tx, input_id)
    locks.lock_steps(tx, dependents)
    supplier = aliased(Step)
    for step_id in dependents:
        is_missing_input = exists(
            select(StepInput.name)
            .join(supplier, supplier.id == StepInput.input_id)
            .where(StepInput.step_id == step_id, supplier.state != StepState.SUCCEEDED)
        )
        if move_step(tx, step_id, StepEvent.INPUTS_READY, only_if=~is_missing_input):
            _queue_up(tx, step_id)


def _queue_up(tx: Transaction, step_id: str) -> None:
    step = announce_step(tx, step_id, live_job_ids(tx, step_id))
    tx.due_classes.add(step.resource_class)


def _cancel_dependents(tx: Transaction, input_id: str) -> None:
    """Cancel everything that waits for a step that will never succeed, and what waits for that."""
    row = tx.connection.execute(select(Step.kind, Step.error).where(Step.id == input_id)).one()
    root = (row.error or {}).get("details", {}).get("root_step_id") or input_id
    for step_id in _dependents(tx, input_id):
        error = InputFailed(
            f"Not run: the {row.kind} step it needs did not succeed.", input_step_id=input_id, root_step_id=root
        )
        locks.lock_steps(tx, [step_id])
        if move_step(tx, step_id, StepEvent.INPUT_FAIL, error=error.to_json()):
            announce_step(tx, step_id, live_job_ids(tx, step_id))
            _cancel_dependents(tx, step_id)


def _dependents(tx: Transaction, input_id: str) -> list[str]:
    rows = tx.connection.execute(
        select(Step.id)
        .join(StepInput, StepInput.step_id == Step.id)
        .where(StepInput.input_id == input_id, Step.state == StepState.WAITING)
        .distinct()
        .order_by(Step.id)
    )
    return list(rows.scalars())


def live_job_ids(tx: Transaction, step_id: str) -> list[str]:
    """Ids of the jobs that still want a step, sorted."""
    return list(tx.connection.execute(_LIVE_JOBS, {"step": step_id}).scalars())


def recompute_job(tx: Transaction, job_id: str) -> None:
    """Derive variant and job states from the job's steps and store them; final states never change here."""
    variants = tx.connection.execute(_VARIANTS, {"job": job_id}).all()
    was_state = variants[0].job_state
    if was_state in FINAL_JOB_STATES:
        return
    steps = _step_views(tx, job_id)
    states: dict[str, str] = {}
    for variant in variants:
        states[variant.id] = variant.state
        if variant.state in FINAL_VARIANT_STATES:
            continue
        states[variant.id], error = judge_variant(variant.id, steps)
        if states[variant.id] != variant.state:
            _store_variant(tx, job_id, variant.id, variant.name, states[variant.id], error)
    job_state = judge_job(list(states.values()), steps)
    if job_state != was_state:
        finalized_at = now() if job_state in FINAL_JOB_STATES else None
        tx.connection.execute(update(Job).where(Job.id == job_id).values(state=job_state, finalized_at=finalized_at))
        emit(tx, [job_id], "job", {"state": job_state})


def _store_variant(
    tx: Transaction, job_id: str, variant_id: str, name: str, state: str, error: Mapping[str, Any] | None
) -> None:
    finalized_at = now() if state in FINAL_VARIANT_STATES else None
    tx.connection.execute(
        update(Variant).where(Variant.id == variant_id).values(state=state, error=error, finalized_at=finalized_at)
    )
    emit(tx, [job_id], "variant", {"name": name, "state": state, "error": error})


def _step_views(tx: Transaction, job_id: str) -> list[StepView]:
    rows = tx.connection.execute(_STEP_VIEWS, {"job": job_id}).all()
    variants: dict[str, set[str]] = {row.id: set() for row in rows}
    for row in rows:
        if row.variant_id is not None:
            variants[row.id].add(row.variant_id)
    return [
        StepView(row.kind, row.state, row.error, row.token > 0 and not row.reused, frozenset(variants[row.id]))
        for row in {row.id: row for row in rows}.values()
    ]


def drop_unwanted_steps(tx: Transaction, job_id: str) -> None:
    """Cancel those steps of a job that no live job links to; the job itself is already final."""
    step_ids = list(
        tx.connection.execute(
            select(Step.id)
            .join(JobStep, JobStep.step_id == Step.id)
            .where(JobStep.job_id == job_id, Step.state.in_(LIVE_STEP_STATES))
            .order_by(Step.id)
        ).scalars()
    )
    locks.lock_steps(tx, step_ids)
    for step_id in step_ids:
        if live_job_ids(tx, step_id):
            continue
        token = tx.connection.execute(select(Step.token).where(Step.id == step_id)).scalar_one()
        if move_step(tx, step_id, StepEvent.CANCEL):
            close_attempt(tx, step_id, token, AttemptState.CANCELLED)
            announce_step(tx, step_id, [job_id])
