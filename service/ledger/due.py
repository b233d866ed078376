"""Due steps: which there are, whose turn it is, and which of them a worker can run.

Tenants take turns, class by class: first the one with the fewest steps running, then the one that has waited longest
for its turn. Priority orders a tenant's own steps and no others'. Every question is answered from an index that holds
unfinished steps only, in this order, so that neither finished nor queued work makes a claim slow. Decides and changes
nothing but turns; `service.ledger.claims` claims.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, bindparam, func, literal_column, or_, select, true

from service.ledger.clock import now
from service.ledger.database import Transaction
from service.ledger.states import StepState
from service.ledger.tables import Step, Tenant, Turn, Worker

#: How many due steps a claim looks at before it gives up to rivals.
_CANDIDATES = 8
_ENOUGH = 2
#: Share of a host's memory that its running steps may be predicted to use together; the rest is the system's.
_USABLE_MEMORY = 0.9

# Written into the statement, as in the indexes' own conditions: a bound parameter would hide which index may serve.
_QUEUED: ColumnElement[str] = literal_column(f"'{StepState.QUEUED}'")
_RUNNING: ColumnElement[str] = literal_column(f"'{StepState.RUNNING}'")


def is_running() -> ColumnElement[bool]:
    """Whether a step runs, by its state; its lease may have run out."""
    return Step.state == _RUNNING


#: Built once; see `service.ledger.locks`.
_RUNNING_ON_HOST = (
    select(
        Step.resource_class,
        Step.worker_id,
        func.count().label("number"),
        func.sum(Step.predicted_peak_anon_bytes).label("predicted_bytes"),
    )
    .join(Worker, Worker.id == Step.worker_id)
    .where(is_running(), Step.lease_expires_at > now(), Worker.host_id == bindparam("host"))
    .group_by(Step.resource_class, Step.worker_id)
)


def is_due() -> ColumnElement[bool]:
    """Whether a step may be claimed: what is queued, and what runs under an expired lease."""
    return and_(
        Step.state.in_([_QUEUED, _RUNNING]),
        or_(
            and_(Step.state == _QUEUED, or_(Step.run_after.is_(None), Step.run_after <= now())),
            and_(Step.state == _RUNNING, Step.lease_expires_at <= now()),
        ),
    )


def select_due(resource_class: str, *conditions: ColumnElement[bool]) -> Select[str]:
    """Return the statement that reads the due steps of a class, in the order of their index."""
    return (
        select(Step.id)
        .where(Step.resource_class == resource_class, is_due(), *conditions)
        .order_by(Step.tenant_id, Step.rank, Step.queued_at, Step.id)
    )


def is_class_due(connection: Connection, resource_class: str) -> bool:
    """Whether a class has due work."""
    return connection.execute(select_due(resource_class).limit(1)).first() is not None


def read_running(connection: Connection, host_id: str) -> Sequence[Any]:
    """Return what runs on a host: `resource_class`, `worker_id`, how many, and what they are predicted to use."""
    return connection.execute(_RUNNING_ON_HOST, {"host": host_id}).all()


def find_due_steps(
    tx: Transaction, resource_class: str, worker: Any, others: Iterable[Any], running: Sequence[Any]
) -> list[str]:
    """Return the next due steps that this worker can run now, or that no live worker ever can.

    The latter are claimed to be planned anew, or to be failed with a sentence: nobody will ever come for them. A worker
    that has just ended counts for as long as one that has fallen silent: it may be coming back, with what was given
    back for it. `others` and `running` are what `fleet.read_claimants` and `read_running` have found.
    """
    mine = and_(_is_made_by(worker), _fits(worker.memory_limit_bytes))
    able = [each for each in others if each.slots.get(resource_class, 0) > 0]
    is_orphan = ~or_(mine, *(and_(_is_made_by(other), _fits(other.memory_limit_bytes)) for other in able))
    mine_now = and_(mine, _fits(_find_free_memory(worker, running)))
    found: list[str] = []
    for tenant_id in find_tenants_in_turn(tx, resource_class):
        next_steps = select_due(resource_class, Step.tenant_id == tenant_id, or_(mine_now, is_orphan))
        found += tx.connection.execute(next_steps.limit(_CANDIDATES - len(found))).scalars()
        # Two are enough to know that there is more than one to wake somebody for; rivals rarely take more.
        if len(found) >= _ENOUGH:
            break
    return found


def find_tenants_in_turn(tx: Transaction, resource_class: str) -> Iterable[str]:
    """Return the tenants with due steps of a class: the fewest running first, then the longest without a turn.

    A tenant that has as many steps running as its quota allows has no turn.
    """
    return tx.connection.execute(_select_in_turn(resource_class)).scalars().all()


@functools.cache
def _select_in_turn(resource_class: str) -> Select[str]:
    running_at_all = select(func.count()).where(
        is_running(), Step.lease_expires_at > now(), Step.tenant_id == Tenant.id
    )
    running = running_at_all.where(Step.resource_class == resource_class)
    is_within_quota = running_at_all.correlate(Tenant).scalar_subquery() < Tenant.max_running_steps
    # A subquery with an order asks the index once a tenant; EXISTS may be turned into a join that reads it all.
    first_due = select_due(resource_class, Step.tenant_id == Tenant.id).limit(1)
    return (
        select(Tenant.id)
        .outerjoin(Turn, and_(Turn.tenant_id == Tenant.id, Turn.resource_class == resource_class))
        .where(
            or_(Tenant.max_running_steps.is_(None), is_within_quota),
            first_due.correlate(Tenant).scalar_subquery().is_not(None),
        )
        .order_by(running.correlate(Tenant).scalar_subquery(), Turn.taken_at.asc().nulls_first(), Tenant.id)
    )


def take_turn(tx: Transaction, tenant_id: str, resource_class: str) -> None:
    """Remember that a tenant had its turn; locks the turn's row until the commit, so it comes last."""
    values = {"taken_at": now()}
    tx.connection.execute(
        tx.insert(Turn)
        .values(tenant_id=tenant_id, resource_class=resource_class, **values)
        .on_conflict_do_update(index_elements=["tenant_id", "resource_class"], set_=values)
    )


def _fits(memory_bytes: int | None) -> Any:
    """Whether a step is predicted to need at most so much memory; None: any step fits."""
    if memory_bytes is None:
        return true()
    return or_(Step.predicted_peak_anon_bytes.is_(None), Step.predicted_peak_anon_bytes <= memory_bytes)


def _find_free_memory(worker: Any, running: Sequence[Any]) -> int | None:
    """Return what the predictions of the host's running steps leave of its memory; None while there are none.

    A step alone is bounded by its worker's limit, and two that each fit need not fit together.
    """
    predicted = [row.predicted_bytes for row in running if row.predicted_bytes is not None]
    return int(worker.host_memory_bytes * _USABLE_MEMORY) - int(sum(predicted)) if predicted else None


def _is_made_by(worker: Any) -> Any:
    """Whether a step was planned for a worker's tools; steps that make no bytes are planned for none."""
    revisions = worker.toolchain["revisions"].items()
    return or_(
        Step.revision == "",
        and_(
            Step.toolchain_id == worker.toolchain_id,
            or_(*(and_(Step.kind == kind, Step.revision == revision) for kind, revision in revisions)),
        ),
    )


def is_step_made_by(worker: Any, step: Any) -> bool:
    """The same of a row."""
    tools = (step.toolchain_id, step.revision)
    return bool(step.revision == "" or tools == (worker.toolchain_id, worker.toolchain["revisions"].get(step.kind)))
