"""The fleet as operators see it: workers, their hosts, and what each is running. Writes nothing.

Names every tenant's work, so it is for operators alone (decision 16). Called by `service.api.workers`.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, and_, select

from service.errors import NotFound
from service.ledger.clock import now
from service.ledger.database import reads
from service.ledger.due import is_running
from service.ledger.fleet import WORKER_SILENCE_S
from service.ledger.tables import Attempt, Host, Step, Worker

#: A worker that vanished is shown this long.
_REMEMBERED_S = 24 * 3600.0


@reads
def read_roster(connection: Connection) -> list[dict[str, Any]]:
    """Return the workers that have not ended, by host and age; those silent for a day are left out."""
    return _describe_workers(connection)


@reads
def read_worker(connection: Connection, worker_id: str) -> dict[str, Any]:
    """Return one worker as the roster shows it; raises `NotFound`."""
    found = [worker for worker in _describe_workers(connection) if worker["id"] == worker_id]
    if not found:
        raise NotFound(f"There is no worker {worker_id!r}. `edgekiln workers` lists those there are.", worker=worker_id)
    return found[0]


def _describe_workers(connection: Connection) -> list[dict[str, Any]]:
    at = connection.execute(select(now())).scalar_one()
    workers = connection.execute(
        select(Worker.__table__, Host.cores, Host.memory_bytes)
        .join(Host, Host.id == Worker.host_id)
        .where(Worker.heartbeat_at > now(-_REMEMBERED_S), Worker.ended_at.is_(None))
        .order_by(Worker.host_id, Worker.started_at, Worker.id)
    ).all()
    host_of = {row.id: row.host_id for row in workers}
    running = defaultdict(list)
    predicted_bytes: Counter[str] = Counter()
    for step in _read_running(connection):
        running[step.worker_id].append(_describe_step(step))
        predicted_bytes[host_of.get(step.worker_id, "")] += step.predicted_peak_anon_bytes or 0
    return [_describe_worker(row, at, running[row.id], predicted_bytes[row.host_id]) for row in workers]


def _read_running(connection: Connection) -> list[Any]:
    return list(
        connection.execute(
            select(
                Step.id,
                Step.kind,
                Step.resource_class,
                Step.tenant_id,
                Step.worker_id,
                Step.predicted_peak_anon_bytes,
                Attempt.started_at,
            )
            .join(Attempt, and_(Attempt.step_id == Step.id, Attempt.token == Step.token))
            .where(is_running(), Step.lease_expires_at > now())
            .order_by(Attempt.started_at, Step.id)
        )
    )


def _describe_step(row: Any) -> dict[str, Any]:
    return {
        "step_id": row.id,
        "kind": row.kind,
        "class": row.resource_class,
        "tenant": row.tenant_id,
        "predicted_peak_anon_bytes": row.predicted_peak_anon_bytes,
        "started_at": row.started_at.isoformat(),
    }


def _describe_worker(row: Any, at: dt.datetime, running: list[dict[str, Any]], predicted_bytes: int) -> dict[str, Any]:
    age_s = (at - row.heartbeat_at).total_seconds()
    busy = Counter(step["class"] for step in running)
    return {
        "id": row.id,
        "host": row.host_id,
        "state": _judge_state(row, age_s),
        "cores": row.cores,
        "memory_bytes": row.memory_bytes,
        "memory_predicted_bytes": predicted_bytes,
        "memory_limit_bytes": row.memory_limit_bytes,
        "disk_bytes": row.disk_bytes,
        "disk_free_bytes": row.disk_free_bytes,
        "slots": {name: {"busy": busy[name], "total": total} for name, total in row.slots.items()},
        "toolchain_id": row.toolchain_id,
        "toolchain": _versions(row.toolchain),
        "isolation": row.isolation.get("isolation"),
        "started_at": row.started_at.isoformat(),
        "heartbeat_age_s": round(max(age_s, 0.0), 3),
        "draining_at": row.draining_at and row.draining_at.isoformat(),
        "running": running,
    }


def _versions(toolchain: Mapping[str, Any]) -> dict[str, str]:
    return dict(toolchain.get("versions", {}))


def _judge_state(row: Any, age_s: float) -> str:
    """`silent` before all else: whoever is not heard of finishes nothing."""
    if age_s >= WORKER_SILENCE_S:
        return "silent"
    return "live" if row.draining_at is None else "draining"
