"""Hosts and workers as the ledger knows them: who has come, who lives, who is being drained.

Called by `workers.process`, and by `service.api` for operators; read by `/readyz` and by `edgekiln health`. What they
are running is in `service.ledger.roster`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, bindparam, insert, or_, select, update

from service.errors import NotFound
from service.ledger import locks
from service.ledger.clock import now
from service.ledger.database import Transaction, asks, reads, writes
from service.ledger.keys import Toolchain, new_id
from service.ledger.tables import Host, Worker

#: A worker that was silent this long is not counted on; its steps pass on by their leases, much earlier.
WORKER_SILENCE_S = 60.0


def was_heard_of() -> ColumnElement[bool]:
    """Whether a worker was heard of lately; it may have ended since."""
    return Worker.heartbeat_at > now(-WORKER_SILENCE_S)


def is_live() -> ColumnElement[bool]:
    """Whether a worker is counted on: heard of lately, and not ended in good order."""
    return and_(was_heard_of(), Worker.ended_at.is_(None))


@writes
def register_worker(
    tx: Transaction,
    host_id: str,
    *,
    cores: int,
    memory_bytes: int,
    memory_limit_bytes: int,
    slots: Mapping[str, int],
    toolchain: Toolchain,
    isolation: Mapping[str, Any],
    disk_bytes: int | None = None,
    disk_free_bytes: int | None = None,
) -> str:
    """Enter a worker process and its host; return the worker's id.

    `memory_bytes` is the host's whole memory, `memory_limit_bytes` what one step of this worker may use of it;
    `disk_bytes` and `disk_free_bytes` are of the file system with its work folder.
    """
    record = {"cores": cores, "memory_bytes": memory_bytes}
    tx.connection.execute(
        tx.insert(Host).values(id=host_id, **record).on_conflict_do_update(index_elements=["id"], set_=record)
    )
    worker_id = new_id("worker")
    tx.connection.execute(
        insert(Worker).values(
            id=worker_id,
            host_id=host_id,
            slots=dict(slots),
            toolchain=toolchain.to_json(),
            toolchain_id=toolchain.id,
            isolation=dict(isolation),
            memory_limit_bytes=memory_limit_bytes,
            disk_bytes=disk_bytes,
            disk_free_bytes=disk_free_bytes,
            started_at=now(),
            heartbeat_at=now(),
        )
    )
    return worker_id


@writes
def beat_worker(tx: Transaction, worker_id: str, disk_free_bytes: int | None = None) -> None:
    """Say that a worker lives, and how much disk it has left."""
    beat = update(Worker).where(Worker.id == worker_id)
    tx.connection.execute(beat.values(heartbeat_at=now(), disk_free_bytes=disk_free_bytes))


@writes
def end_worker(tx: Transaction, worker_id: str) -> None:
    """Say that a worker has ended in good order: nobody waits for its next heartbeat."""
    tx.connection.execute(update(Worker).where(Worker.id == worker_id).values(ended_at=now()))


@writes
def drain_worker(tx: Transaction, worker_id: str) -> None:
    """Let a worker claim nothing more and finish what it runs; raises `NotFound`.

    When this returns, no claim of the worker's is under way.
    """
    _lock_host(tx, worker_id)
    is_claiming = Worker.id == worker_id, Worker.draining_at.is_(None)
    tx.connection.execute(update(Worker).where(*is_claiming).values(draining_at=now()))


@writes
def resume_worker(tx: Transaction, worker_id: str) -> None:
    """Let a drained worker claim again, and wake it; raises `NotFound`."""
    tx.due_classes.update(_lock_host(tx, worker_id))
    tx.connection.execute(update(Worker).where(Worker.id == worker_id).values(draining_at=None))


def _lock_host(tx: Transaction, worker_id: str) -> list[str]:
    """Keep the worker from claiming meanwhile; return the classes that it serves."""
    row = tx.connection.execute(select(Worker.host_id, Worker.slots).where(Worker.id == worker_id)).one_or_none()
    if row is None:
        raise NotFound(f"There is no worker {worker_id!r}. `edgekiln workers` lists those there are.", worker=worker_id)
    locks.lock_host(tx, row.host_id)
    return [name for name, count in row.slots.items() if count > 0]


_CLAIMANTS = (
    select(
        Worker.id,
        Worker.host_id,
        Worker.slots,
        Worker.toolchain_id,
        Worker.toolchain,
        Worker.memory_limit_bytes,
        Worker.draining_at,
        and_(is_live(), Worker.draining_at.is_(None)).label("is_claiming"),
        was_heard_of().label("was_heard_of"),
        Host.memory_bytes.label("host_memory_bytes"),
    )
    .join(Host, Host.id == Worker.host_id)
    .where(or_(was_heard_of(), Worker.id == bindparam("worker")))
)


def read_claimants(connection: Connection, worker_id: str) -> tuple[Any, list[Any]]:
    """Return a worker with its host's memory, and all that were heard of lately, for a claim in the same transaction.

    Each row says by `is_claiming` whether the worker is live and not being drained.
    """
    rows = connection.execute(_CLAIMANTS, {"worker": worker_id}).all()
    (mine,) = [row for row in rows if row.id == worker_id]
    return mine, [row for row in rows if row.was_heard_of]


def select_claiming_slots(connection: Connection) -> list[dict[str, int]]:
    """Return the slots of the live workers that claim, in a transaction of the caller's."""
    return list(connection.execute(select(Worker.slots).where(is_live(), Worker.draining_at.is_(None))).scalars())


@asks
def is_heard(connection: Connection, worker_id: str, within_s: float) -> bool:
    """Whether a worker has said lately that it lives."""
    heard = select(Worker.id).where(Worker.id == worker_id, Worker.heartbeat_at > now(-within_s))
    return connection.execute(heard).first() is not None


@reads
def list_workers(connection: Connection, seen_within_s: float) -> list[dict[str, Any]]:
    """Return the workers heard of lately, as `/readyz` shows them: nothing of what they run."""
    rows = connection.execute(
        select(
            Worker.id,
            Worker.host_id,
            Worker.slots,
            Worker.toolchain_id,
            Worker.isolation,
            Worker.memory_limit_bytes,
            Worker.heartbeat_at,
        )
        .where(Worker.heartbeat_at > now(-seen_within_s), Worker.ended_at.is_(None))
        .order_by(Worker.started_at)
    )
    return [
        {
            "id": row.id,
            "host": row.host_id,
            "slots": row.slots,
            "toolchain_id": row.toolchain_id,
            "isolation": row.isolation,
            "memory_limit_bytes": row.memory_limit_bytes,
            "heartbeat_at": row.heartbeat_at.isoformat(),
        }
        for row in rows
    ]


@reads
def find_largest_memory(connection: Connection, resource_class: str) -> int | None:
    """Return the most memory that a step of a class may use on any live worker, in bytes; None without a worker."""
    return select_largest_memory(connection, resource_class)


def select_largest_memory(connection: Connection, resource_class: str) -> int | None:
    """Do the same in a transaction of the caller's."""
    rows = connection.execute(
        select(Worker.memory_limit_bytes, Worker.slots).where(is_live(), Worker.memory_limit_bytes.is_not(None))
    )
    return max((row.memory_limit_bytes for row in rows if row.slots.get(resource_class, 0) > 0), default=None)
