"""Hosts and workers as the ledger knows them.

Called by `workers.process`; read by `/readyz` and by `edgekiln health`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, insert, select, update

from service.ledger.clock import now
from service.ledger.database import Transaction, reads, writes
from service.ledger.keys import Toolchain, new_id
from service.ledger.tables import Host, Worker

#: A worker that was silent this long is not counted on; its steps pass on by their leases, much earlier.
WORKER_SILENCE_S = 60.0


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
) -> str:
    """Enter a worker process and its host; return the worker's id.

    `memory_bytes` is the host's whole memory, `memory_limit_bytes` what one step of this worker may use of it.
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
            started_at=now(),
            heartbeat_at=now(),
        )
    )
    return worker_id


@writes
def beat_worker(tx: Transaction, worker_id: str) -> None:
    """Say that a worker lives."""
    tx.connection.execute(update(Worker).where(Worker.id == worker_id).values(heartbeat_at=now()))


@reads
def is_heard(connection: Connection, worker_id: str, within_s: float) -> bool:
    """Whether a worker has said lately that it lives."""
    heard = select(Worker.id).where(Worker.id == worker_id, Worker.heartbeat_at > now(-within_s))
    return connection.execute(heard).first() is not None


@reads
def list_workers(connection: Connection, seen_within_s: float) -> list[dict[str, Any]]:
    """Return the workers heard of lately."""
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
        .where(Worker.heartbeat_at > now(-seen_within_s))
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
        select(Worker.memory_limit_bytes, Worker.slots).where(
            Worker.heartbeat_at > now(-WORKER_SILENCE_S), Worker.memory_limit_bytes.is_not(None)
        )
    )
    return max((row.memory_limit_bytes for row in rows if row.slots.get(resource_class, 0) > 0), default=None)
