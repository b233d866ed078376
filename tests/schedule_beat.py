"""A process that fires what is due, together with others; imports little, since each of them starts anew."""

from __future__ import annotations

from multiprocessing.synchronize import Barrier

from service.ledger import schedules
from service.ledger.database import Database
from service.requests import JobRequest

_barrier: Barrier


def join(barrier: Barrier) -> None:
    """Take the barrier at which the processes meet."""
    global _barrier
    _barrier = barrier


def beat(url: str) -> int:
    """Read what is due, wait until the others have too, fire, and return how many ticks were fired here."""
    database = Database(url)
    try:
        return len(schedules.fire_due(database, _meet, {}, max_variants=256))
    finally:
        database.close()


def _meet(request: JobRequest) -> JobRequest:
    _barrier.wait(120)
    return request
