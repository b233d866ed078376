"""Schedules: jobs that are submitted again by themselves, once a tick.

Every worker's sweep calls `fire_due`. Whoever comes first moves `next_at` on, by an UPDATE that demands its old value,
in the transaction that submits the job: however many workers come, a tick is fired once, and a crash fires it whole or
not at all. `service.api` makes, shows, pauses and removes schedules.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, insert, or_, select, update

from service.errors import Conflict, EdgeKilnError, NotFound, QuotaExceeded
from service.ledger.clock import now
from service.ledger.database import Database, Transaction, reads, writes
from service.ledger.jobs import add_job, require_few_variants
from service.ledger.keys import new_id
from service.ledger.quotas import require_room_for_schedule
from service.ledger.states import FINAL_JOB_STATES, TickOutcome
from service.ledger.tables import Job, Schedule, ScheduleTick, ScheduleUpload
from service.ledger.uploads import hold_uploads
from service.requests import JobRequest, parse_stored_request
from service.schedules import ScheduleRequest, Timing, read_ticks

#: A tick that is fired within this time is not missed, whatever the policy; and so long a worker leaves a folder that
#: it cannot read to others.
GRACE_S = 300.0
#: Schedules that one sweep fires at most.
_BATCH = 100
#: Past ticks that are remembered of each schedule.
_TICKS_KEPT = 100
#: Ticks that a schedule's document shows, past and to come.
_TICKS_SHOWN = 20
_TICKS_AHEAD = 5


#: What a worker cannot admit: schedule and tick -> since when, by the ledger's clock. A worker keeps it for its life,
#: so that after an outage, too, the others have their time.
Refusals = dict[tuple[str, dt.datetime], dt.datetime]


@dataclass(frozen=True)
class Tick:
    """What became of a tick."""

    schedule_id: str
    name: str
    tick_at: dt.datetime
    outcome: TickOutcome
    job_id: str | None = None
    error: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Due:
    """A schedule whose tick has come, as it was read."""

    schedule_id: str
    tenant_id: str
    name: str
    request: dict[str, Any]
    overlap: str
    #: `next_at` as it was read: the oldest tick that was not fired.
    due_at: dt.datetime
    #: The tick to fire; None when it was missed and is to be left out.
    tick_at: dt.datetime | None
    #: The first tick to come.
    following_at: dt.datetime
    read_at: dt.datetime


# --- what users do ------------------------------------------------------------------------------


@writes
def add_schedule(tx: Transaction, tenant_id: str, request: ScheduleRequest, *, max_variants: int) -> str:
    """Store a schedule and return its id; the caller has checked the source's folder.

    Raises `Conflict` when the name is taken, `QuotaExceeded`, and what `submit_job` raises for the job.
    """
    require_few_variants(request.job, max_variants)
    require_room_for_schedule(tx, tenant_id)
    schedule_id = new_id("sch")
    made_at = _read_now(tx.connection)
    timing = Timing(request.cron, request.time_zone, request.every_s, made_at)
    inserted = tx.connection.execute(
        tx.insert(Schedule)
        .values(
            id=schedule_id,
            tenant_id=tenant_id,
            name=request.name,
            request=request.job.to_json(),
            cron=request.cron,
            time_zone=request.time_zone,
            every_s=request.every_s,
            missed=request.missed,
            overlap=request.overlap,
            next_at=timing.next_after(made_at),
            tick_count=0,
            created_at=made_at,
        )
        .on_conflict_do_nothing(index_elements=["tenant_id", "name"])
        .returning(Schedule.id)
    )
    if inserted.first() is None:
        raise Conflict(
            f"There is a schedule {request.name!r} already. Choose another name, or remove that one first.",
            name=request.name,
        )
    hold_uploads(tx, tenant_id, request.job.held_uploads, ScheduleUpload, schedule_id=schedule_id)
    return schedule_id


@writes
def pause_schedule(tx: Transaction, tenant_id: str, schedule_id: str) -> None:
    """Fire no more ticks until it is resumed; nothing happens when it is paused already. Raises `NotFound`."""
    _find(tx.connection, tenant_id, schedule_id)
    is_active = Schedule.id == schedule_id, Schedule.paused_at.is_(None)
    tx.connection.execute(update(Schedule).where(*is_active).values(paused_at=now()))


@writes
def resume_schedule(tx: Transaction, tenant_id: str, schedule_id: str) -> None:
    """Go on with the next tick from now; those of the pause are not made up for. Raises `NotFound`.

    Of an active schedule the next tick is reckoned anew, which is of use after a clock had been wrong.
    """
    row = _find(tx.connection, tenant_id, schedule_id)
    next_at = _timing(row).next_after(_read_now(tx.connection))
    tx.connection.execute(update(Schedule).where(Schedule.id == schedule_id).values(paused_at=None, next_at=next_at))


@writes
def remove_schedule(tx: Transaction, tenant_id: str, schedule_id: str) -> None:
    """Forget a schedule and its ticks; its jobs stay. Raises `NotFound`."""
    _find(tx.connection, tenant_id, schedule_id)
    # Locks the row: a tick that is being fired comes before or not at all.
    tx.connection.execute(update(Schedule).where(Schedule.id == schedule_id).values(paused_at=now()))
    for table in (ScheduleTick, ScheduleUpload):
        tx.connection.execute(delete(table).where(table.schedule_id == schedule_id))
    tx.connection.execute(delete(Schedule).where(Schedule.id == schedule_id))


# --- what happens by itself ---------------------------------------------------------------------


def fire_due(
    database: Database, admit: Callable[[JobRequest], JobRequest], refusals: Refusals, *, max_variants: int
) -> list[Tick]:
    """Fire every tick that has come, and return those that were fired here.

    `admit` looks again at what the request names on this host; what it refuses is entered in `refusals`, left to other
    workers for a while, and then recorded. No transaction is open meanwhile.
    """
    fired: list[Tick] = []
    refused: Refusals = {}
    for due in _list_due(database):
        if len(fired) == _BATCH:
            refused = {**refusals, **refused}
            break
        request, refusal = None, None
        try:
            request = admit(parse_stored_request(due.request)) if due.tick_at is not None else None
        except EdgeKilnError as error:
            name = due.schedule_id, due.due_at
            since = refused[name] = refusals.get(name, due.read_at)
            if due.read_at - since < dt.timedelta(seconds=GRACE_S):
                continue
            refusal = error.to_json()
        tick = _fire(database, due, request, refusal, max_variants)
        if tick is not None:
            fired.append(tick)
    # What is due no more is forgotten.
    refusals.clear()
    refusals.update(refused)
    return fired


def _list_due(database: Database) -> Iterator[_Due]:
    """Yield every due schedule, the oldest tick first; those that are left to other workers hold up none behind."""
    batch = _read_due(database, None)
    while batch:
        yield from batch
        batch = _read_due(database, batch[-1])


@reads
def _read_due(connection: Connection, last: _Due | None) -> list[_Due]:
    statement = select(Schedule.__table__).where(Schedule.next_at <= now(), Schedule.paused_at.is_(None))
    if last is not None:
        is_behind = and_(Schedule.next_at == last.due_at, Schedule.id > last.schedule_id)
        statement = statement.where(or_(Schedule.next_at > last.due_at, is_behind))
    rows = connection.execute(statement.order_by(Schedule.next_at, Schedule.id).limit(_BATCH)).all()
    if not rows:
        return []
    instant = _read_now(connection)
    return [_describe_due(row, instant) for row in rows]


def _describe_due(row: Any, instant: dt.datetime) -> _Due:
    timing = _timing(row)
    grace = dt.timedelta(seconds=GRACE_S)
    is_late = instant - row.next_at > grace
    tick_at: dt.datetime | None = row.next_at
    if is_late and row.missed == "skip":
        # The last one may still be in time.
        recent = timing.next_after(instant - grace)
        tick_at = recent if recent <= instant else None
    return _Due(
        schedule_id=row.id,
        tenant_id=row.tenant_id,
        name=row.name,
        request=row.request,
        overlap=row.overlap,
        due_at=row.next_at,
        tick_at=tick_at,
        following_at=timing.next_after(max(instant, row.next_at)),
        read_at=instant,
    )


@writes
def _fire(
    tx: Transaction, due: _Due, request: JobRequest | None, refusal: dict[str, Any] | None, max_variants: int
) -> Tick | None:
    """Submit a tick's job, or record why there is none; return None when another worker has fired the tick."""
    number = tx.connection.execute(
        update(Schedule)
        .where(Schedule.id == due.schedule_id, _is_unfired(due))
        .values(next_at=due.following_at, tick_count=Schedule.tick_count + 1)
        .returning(Schedule.tick_count)
    ).scalar_one_or_none()
    if number is None:
        return None
    outcome, job_id, error = TickOutcome.MISSED, None, None
    if refusal is not None:
        outcome, error = TickOutcome.REFUSED, refusal
    elif request is not None and due.overlap == "skip" and _has_unfinished_job(tx.connection, due.schedule_id):
        outcome = TickOutcome.SKIPPED
    elif request is not None:
        outcome, job_id, error = _submit(tx, due.tenant_id, request, max_variants)
    tick = Tick(due.schedule_id, due.name, due.tick_at or due.due_at, outcome, job_id, error)
    tx.connection.execute(
        insert(ScheduleTick).values(
            schedule_id=due.schedule_id,
            number=number,
            tick_at=tick.tick_at,
            outcome=outcome,
            job_id=job_id,
            error=error,
            created_at=now(),
        )
    )
    _forget_old_ticks(tx, due.schedule_id, number)
    return tick


def _forget_old_ticks(tx: Transaction, schedule_id: str, number: int) -> None:
    """Keep the last ticks, and any whose job has not ended: later ones are skipped for its sake."""
    is_live = exists(Job.id).where(Job.id == ScheduleTick.job_id, Job.state.not_in(FINAL_JOB_STATES))
    tx.connection.execute(
        delete(ScheduleTick).where(
            ScheduleTick.schedule_id == schedule_id, ScheduleTick.number <= number - _TICKS_KEPT, ~is_live
        )
    )


def _is_unfired(due: _Due) -> ColumnElement[bool]:
    """What makes a tick fire once: the first to come changes `next_at`, and the others find it changed."""
    return and_(Schedule.next_at == due.due_at, Schedule.next_at <= now(), Schedule.paused_at.is_(None))


def _has_unfinished_job(connection: Connection, schedule_id: str) -> bool:
    unfinished = (
        select(Job.id)
        .join(ScheduleTick, ScheduleTick.job_id == Job.id)
        .where(ScheduleTick.schedule_id == schedule_id, Job.state.not_in(FINAL_JOB_STATES))
    )
    return connection.execute(unfinished.limit(1)).first() is not None


def _submit(
    tx: Transaction, tenant_id: str, request: JobRequest, max_variants: int
) -> tuple[TickOutcome, str | None, dict[str, Any] | None]:
    """Submit a job; what refuses it is recorded, and must not keep the tick from being past."""
    try:
        with tx.connection.begin_nested():
            return TickOutcome.SUBMITTED, add_job(tx, tenant_id, request, max_variants=max_variants)["id"], None
    except EdgeKilnError as error:
        # A tenant at its quota does not hold up the others' ticks, and its own is not saved for later.
        if error.retryable and not isinstance(error, QuotaExceeded):
            raise
        return TickOutcome.REFUSED, None, error.to_json()


# --- what readers see ---------------------------------------------------------------------------


@reads
def read_schedule(connection: Connection, tenant_id: str, schedule_id: str) -> dict[str, Any]:
    """Return a schedule with its last ticks, the newest first; raises `NotFound`."""
    row = _find(connection, tenant_id, schedule_id)
    ticks = connection.execute(
        select(ScheduleTick.__table__)
        .where(ScheduleTick.schedule_id == schedule_id)
        .order_by(ScheduleTick.number.desc())
        .limit(_TICKS_SHOWN)
    )
    return {**_document(row), "ticks": [_describe_tick(tick) for tick in ticks]}


@reads
def list_schedules(
    connection: Connection, tenant_id: str, *, limit: int = 50, before: str | None = None
) -> list[dict[str, Any]]:
    """Return a tenant's schedules, the newest first; `before` is the id of the last one of the page before."""
    statement = select(Schedule.__table__).where(Schedule.tenant_id == tenant_id)
    if before is not None:
        last = _find(connection, tenant_id, before)
        is_older = Schedule.created_at < last.created_at
        statement = statement.where(or_(is_older, and_(Schedule.created_at == last.created_at, Schedule.id < last.id)))
    rows = connection.execute(statement.order_by(Schedule.created_at.desc(), Schedule.id.desc()).limit(limit)).all()
    is_last = and_(ScheduleTick.schedule_id == Schedule.id, ScheduleTick.number == Schedule.tick_count)
    last_ticks = {
        tick.schedule_id: _describe_tick(tick)
        for tick in connection.execute(
            select(ScheduleTick.__table__).join(Schedule, is_last).where(Schedule.id.in_([row.id for row in rows]))
        )
    }
    return [{**_document(row), "last_tick": last_ticks.get(row.id)} for row in rows]


def _find(connection: Connection, tenant_id: str, schedule_id: str) -> Any:
    row = connection.execute(
        select(Schedule.__table__).where(Schedule.id == schedule_id, Schedule.tenant_id == tenant_id)
    ).one_or_none()
    if row is None:
        raise NotFound(
            f"There is no schedule {schedule_id!r}. `edgekiln schedules list` lists those there are.",
            schedule_id=schedule_id,
        )
    return row


def _timing(row: Any) -> Timing:
    return Timing(row.cron, row.time_zone, row.every_s, row.created_at)


def _read_now(connection: Connection) -> dt.datetime:
    instant: dt.datetime = connection.execute(select(now())).scalar_one()
    return instant


def _document(row: Any) -> dict[str, Any]:
    is_paused = row.paused_at is not None
    ahead = [] if is_paused else read_ticks(_timing(row), row.next_at, _TICKS_AHEAD)
    return {
        "id": row.id,
        "name": row.name,
        "state": "paused" if is_paused else "active",
        "cron": row.cron,
        "time_zone": row.time_zone,
        "every_s": row.every_s,
        "missed": row.missed,
        "overlap": row.overlap,
        "job": row.request,
        "next_ticks": [tick.isoformat() for tick in ahead],
        "created_at": row.created_at.isoformat(),
        "paused_at": row.paused_at.isoformat() if is_paused else None,
    }


def _describe_tick(row: Any) -> dict[str, Any]:
    return {
        "tick_at": row.tick_at.isoformat(),
        "outcome": row.outcome,
        "job_id": row.job_id,
        "error": row.error,
        "fired_at": row.created_at.isoformat(),
    }
