"""Turns step specifications into rows: finds the step that already does the work, or makes it.

Called inside the transactions of `service.ledger.jobs` and `service.ledger.claims`. The job is locked.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, insert, select, text, update

from service.devices import PHONE_CLASS
from service.errors import MemoryInsufficient
from service.ledger import locks
from service.ledger.clock import now
from service.ledger.database import StaleView, Transaction
from service.ledger.events import emit
from service.ledger.fleet import select_largest_memory
from service.ledger.keys import Toolchain, new_id, step_key
from service.ledger.plan import StepSpec
from service.ledger.states import StepState
from service.ledger.tables import Job, JobStep, Step, StepInput, Variant, VariantStep

#: The work of a planner that has no toolchain: steps that make no bytes.
NO_TOOLCHAIN = Toolchain(versions={}, revisions={})


@dataclass(frozen=True)
class ReusedStep:
    """A step that a plan found done or under way."""

    id: str
    kind: str
    key: str


def add_steps(
    tx: Transaction,
    job_id: str,
    specs: Sequence[StepSpec],
    toolchain: Toolchain,
    known_steps: dict[str, str],
    checkpoint_digest: str | None,
) -> list[ReusedStep]:
    """Link a job to every step of `specs`, joining shared ones by key and making the rest; return those joined.

    `known_steps` maps names of specs that already have rows to their step ids, and grows. Raises `MemoryInsufficient`
    when no live worker may use as much memory as a step to be made is predicted to need.
    """
    job = tx.connection.execute(select(Job.tenant_id, Job.priority).where(Job.id == job_id)).one()
    variant_ids = dict(tx.connection.execute(select(Variant.name, Variant.id).where(Variant.job_id == job_id)).all())
    position = tx.connection.execute(
        select(func.coalesce(func.max(JobStep.position), -1)).where(JobStep.job_id == job_id)
    ).scalar_one()
    reused = []
    for spec in specs:
        position += 1
        input_ids = {name: known_steps[supplier] for name, supplier in spec.inputs.items()}
        step_id, was_there = _ensure_step(tx, job_id, job, spec, toolchain, input_ids, checkpoint_digest)
        known_steps[spec.name] = step_id
        if not was_there:
            _require_memory(tx, spec)
        _link(tx, job_id, step_id, position, was_there)
        serve_variants(tx, step_id, [variant_ids[name] for name in spec.variants])
        row = tx.connection.execute(select(Step.key, Step.state).where(Step.id == step_id)).one()
        if was_there:
            reused.append(ReusedStep(step_id, spec.kind, row.key))
        _announce(tx, job_id, step_id, spec.kind, row.state, reused=was_there)
    return reused


def link_steps(tx: Transaction, job_id: str, step_ids: Iterable[str], variant: str) -> None:
    """Link a new job to steps that have succeeded for others, for the sake of one of its variants."""
    is_it = Variant.job_id == job_id, Variant.name == variant
    variant_id = tx.connection.execute(select(Variant.id).where(*is_it)).scalar_one()
    for position, step_id in enumerate(step_ids):
        _link(tx, job_id, step_id, position, reused=True)
        serve_variants(tx, step_id, [variant_id])
        row = tx.connection.execute(select(Step.kind, Step.state).where(Step.id == step_id)).one()
        _announce(tx, job_id, step_id, row.kind, row.state, reused=True)


def _announce(tx: Transaction, job_id: str, step_id: str, kind: str, state: str, *, reused: bool) -> None:
    data = {"step_id": step_id, "kind": kind, "state": state, "reused": reused, "error": None}
    emit(tx, [job_id], "step", data)


def _require_memory(tx: Transaction, spec: StepSpec) -> None:
    """Raise `MemoryInsufficient` if a step can run nowhere; without any worker it waits for one, like all work."""
    predicted_bytes = spec.predicted_peak_anon_bytes
    largest_bytes = select_largest_memory(tx.connection, spec.resource_class)
    if predicted_bytes is not None and largest_bytes is not None and predicted_bytes > largest_bytes:
        raise MemoryInsufficient.from_prediction(spec.name, predicted_bytes, largest_bytes)


def _link(tx: Transaction, job_id: str, step_id: str, position: int, reused: bool) -> None:
    """Link a job to a step; a retry finds the steps that had succeeded linked already."""
    statement = tx.insert(JobStep).values(
        job_id=job_id, step_id=step_id, position=position, reused=reused, superseded=False
    )
    tx.connection.execute(
        statement.on_conflict_do_update(
            index_elements=["job_id", "step_id"], set_={"position": position, "superseded": False}
        )
    )


def serve_variants(tx: Transaction, step_id: str, variant_ids: Sequence[str]) -> None:
    """Say that a step is for these variants too."""
    for variant_id in variant_ids:
        statement = tx.insert(VariantStep).values(variant_id=variant_id, step_id=step_id)
        tx.connection.execute(statement.on_conflict_do_nothing())


def _ensure_step(
    tx: Transaction,
    job_id: str,
    job: Any,
    spec: StepSpec,
    toolchain: Toolchain,
    input_ids: dict[str, str],
    checkpoint_digest: str | None,
) -> tuple[str, bool]:
    """Return a step's id and whether another request had made it."""
    inputs = {
        row.id: row
        for row in tx.connection.execute(
            select(Step.id, Step.kind, Step.key, Step.state).where(Step.id.in_(input_ids.values()))
        )
    }
    # The checkpoint stands in the key by content, so that the same files from another source are the same work.
    input_keys = {name: inputs[step_id].key for name, step_id in input_ids.items() if inputs[step_id].kind != "fetch"}
    if spec.resource_class == PHONE_CLASS:
        # What measures lies on the phone: any device worker may take it, whatever its own packages are.
        toolchain = NO_TOOLCHAIN
    revision = toolchain.revisions.get(spec.kind, "")
    key = step_key(spec.kind, spec.params, checkpoint_digest, input_keys, toolchain.id, revision)
    if not spec.shared and (own := _find_own_step(tx, job_id, key)) is not None:
        return own, True
    is_due = all(row.state == StepState.SUCCEEDED for row in inputs.values())
    values = _describe_step(job.tenant_id, job.priority, spec, key, toolchain, is_due=is_due, at=now())
    if not _insert_step(tx, values, spec.shared):
        return _join_step(tx, job, key), True
    for name, input_id in input_ids.items():
        tx.connection.execute(insert(StepInput).values(step_id=values["id"], name=name, input_id=input_id))
    if is_due:
        tx.due_classes.add(spec.resource_class)
    return str(values["id"]), False


def _describe_step(
    tenant_id: str, priority: int, spec: StepSpec, key: str, toolchain: Toolchain, *, is_due: bool, at: Any
) -> dict[str, Any]:
    """Return the columns of a new step; `at` is the database's time, or what stands for it."""
    return {
        "id": new_id("step"),
        "tenant_id": tenant_id,
        "kind": spec.kind,
        "key": key,
        "shared": spec.shared,
        "params": dict(spec.params),
        "resource_class": spec.resource_class,
        "predicted_peak_anon_bytes": spec.predicted_peak_anon_bytes,
        "state": StepState.QUEUED if is_due else StepState.WAITING,
        "priority": priority,
        "rank": _rank_step(spec.kind, priority),
        "token": 0,
        "failure_count": 0,
        "loss_count": 0,
        "toolchain_id": toolchain.id,
        "revision": toolchain.revisions.get(spec.kind, ""),
        "created_at": at,
        "queued_at": at if is_due else None,
    }


def describe_first_step(tenant_id: str, priority: int, spec: StepSpec, at: dt.datetime) -> dict[str, Any]:
    """Return the columns of a new job's first step, which needs nothing and is nobody else's."""
    key = step_key(spec.kind, spec.params, None, {}, NO_TOOLCHAIN.id, "")
    return _describe_step(tenant_id, priority, spec, key, NO_TOOLCHAIN, is_due=True, at=at)


def _find_own_step(tx: Transaction, job_id: str, key: str) -> str | None:
    """Return the job's own step that has done this work already (a measurement that a retry need not repeat)."""
    statement = (
        select(Step.id)
        .join(JobStep, JobStep.step_id == Step.id)
        .where(
            JobStep.job_id == job_id,
            JobStep.superseded.is_(False),
            Step.key == key,
            Step.state == StepState.SUCCEEDED,
        )
    )
    return tx.connection.execute(statement.limit(1)).scalar_one_or_none()


def _insert_step(tx: Transaction, values: dict[str, Any], shared: bool) -> bool:
    """Insert a step; a shared one only if no live or succeeded step has its key. Waits for a rival's commit."""
    if not shared:
        tx.connection.execute(insert(Step).values(**values))
        return True
    statement = (
        tx.insert(Step)
        .values(**values)
        .on_conflict_do_nothing(
            index_elements=["tenant_id", "key"],
            index_where=text("shared AND retired_at IS NULL AND state NOT IN ('failed', 'cancelled')"),
        )
        .returning(Step.id)
    )
    return tx.connection.execute(statement).first() is not None


def _join_step(tx: Transaction, job: Any, key: str) -> str:
    """Lock and return the step that does this work; a finish in progress ends first."""
    step_id = tx.connection.execute(
        select(Step.id).where(
            Step.tenant_id == job.tenant_id,
            Step.key == key,
            Step.shared,
            Step.retired_at.is_(None),
            Step.state.not_in([StepState.FAILED, StepState.CANCELLED]),
        )
    ).scalar_one_or_none()
    if step_id is None:
        raise StaleView
    locks.lock_steps(tx, [step_id])
    row = tx.connection.execute(
        select(Step.kind, Step.state, Step.priority, Step.retired_at).where(Step.id == step_id)
    ).one()
    if row.state in (StepState.FAILED, StepState.CANCELLED) or row.retired_at is not None:
        raise StaleView
    if row.priority < job.priority:
        values = {"priority": job.priority, "rank": _rank_step(row.kind, job.priority)}
        tx.connection.execute(update(Step).where(Step.id == step_id).values(**values))
    return str(step_id)


def _rank_step(kind: str, priority: int) -> int:
    """Return a step's place among its tenant's, smaller first: by priority, then bundles.

    A bundle takes a moment, and everything else of its variant waits for it.
    """
    return -2 * priority - (kind == "bundle")
