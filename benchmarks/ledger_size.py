"""What claims and lists cost in a ledger of 100,000 jobs against one of 1,000, on SQLite and PostgreSQL.

    python benchmarks/ledger_size.py --json out/ledger_size.json

Fills ledgers of both sizes: one job that has ended and one that is queued are played through the ledger's own doors,
and their rows are copied under other ids, a tenth of them queued, for twenty tenants; one schedule comes to a hundred
jobs. Then it calls the doors of
workers and readers on both in turn and prints medians and their ratio. A PostgreSQL is started for the purpose, unless
`EDGEKILN_TEST_POSTGRES_URL` names one in which databases may be made.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from service.ledger import access, claims, fleet, jobs, quotas, schedules, views
from service.ledger.counts import read_counts, read_totals
from service.ledger.database import Database, migrate
from service.requests import JobRequest, parse_request
from service.schedules import ScheduleRequest
from tests.ledger_play import POLICY, TENANT, Play
from tests.services import make_database, postgres_url

SMALL, LARGE = 1_000, 100_000
TENANTS = 20
QUEUED_SHARE = 0.1
SCHEDULED_SHARE = 0.01
#: A tenant of its own, with every quota and no work but what it submits.
_BOUNDED = "bounded"
_NO_BOUND = 2**40
#: Copies that one statement makes: the ledger's connections end statements after a minute.
_BATCH = 2_000
#: Pages that are full in both ledgers.
_PAGE, _QUEUED_PAGE = 20, 5

_STEPS = "SELECT step_id FROM job_steps WHERE job_id = :job"
_VARIANTS = "SELECT id FROM variants WHERE job_id = :job"
#: Table -> which rows are a job's; parents before children.
_ROWS = {
    "jobs": "id = :job",
    "variants": "job_id = :job",
    "steps": f"id IN ({_STEPS})",
    "step_inputs": f"step_id IN ({_STEPS})",
    "attempts": f"step_id IN ({_STEPS})",
    "job_steps": "job_id = :job",
    "variant_steps": f"variant_id IN ({_VARIANTS})",
    "events": "job_id = :job",
}
_IDS = {"id", "job_id", "variant_id", "step_id", "input_id"}


def fill(database: Database, count: int) -> None:
    """Enter `count` jobs; statistics are brought up to date, as a server does by itself."""
    for number in range(1, TENANTS):
        Play(database, f"tenant-{number}", f"host-{number}")
    play = Play(database)
    ended = play.submit("/models/ended", recipes=["none"], formats=["tflite"])
    play.run_all()
    queued = play.submit("/models/queued")
    queued_count = int(count * QUEUED_SHARE)
    copy_job(database, ended, count - queued_count - 1)
    copy_job(database, queued, queued_count - 1)
    job = parse_request({"source": {"kind": "folder", "path": "/models/scheduled"}})
    for number in range(int(count * SCHEDULED_SHARE)):
        timing = ScheduleRequest(name=f"nightly {number}", job=job, every_s=3600)
        schedules.add_schedule(database, TENANT, timing, max_variants=9)
    with database.engine.begin() as connection:
        connection.execute(text("ANALYZE"))


def copy_job(database: Database, job_id: str, count: int) -> None:
    """Copy all rows of a job `count` times, each under other ids; tenants own the copies in turn."""
    for first in range(1, count + 1, _BATCH):
        _copy_rows(database, job_id, first, min(first + _BATCH - 1, count))


def _copy_rows(database: Database, job_id: str, first: int, last: int) -> None:
    tenant = f"CASE n % {TENANTS} WHEN 0 THEN '{TENANT}' ELSE 'tenant-' || (n % {TENANTS}) END"
    series = f"WITH RECURSIVE series(n) AS (SELECT {first} UNION ALL SELECT n + 1 FROM series WHERE n < {last})"
    with database.engine.begin() as connection:
        for table, condition in _ROWS.items():
            columns = list(connection.execute(text(f"SELECT * FROM {table} LIMIT 0")).keys())
            values = [
                f"{name} || '_' || n"
                if name in _IDS
                else "substr(key, 1, 56) || '_' || n"
                if name == "key"
                else tenant
                if name == "tenant_id"
                else name
                for name in columns
            ]
            statement = (
                f"INSERT INTO {table} ({', '.join(columns)}) {series} "
                f"SELECT {', '.join(values)} FROM {table}, series WHERE {condition}"
            )
            connection.execute(text(statement), {"job": job_id})


def make_doors(database: Database) -> dict[str, Callable[[], object]]:
    """Return what workers and readers ask, by name; whatever a call claims is given back by the next."""
    play = Play(database, host="host-of-the-benchmark")
    request = parse_request({"source": {"kind": "folder", "path": "/models/new"}})
    middle = views.list_jobs(database, TENANT, limit=_PAGE)[-1]["id"]
    states = ["failed", "queued"]
    held: list[claims.Claim] = []
    access.ensure_tenant(database, _BOUNDED)
    quotas.set_quotas(database, _BOUNDED, dict.fromkeys(quotas.QUOTAS, _NO_BOUND))

    def claim() -> None:
        found = claims.claim_next(database, play.worker_id, "fetch", POLICY)
        assert found is not None
        held.append(found)

    def release() -> None:
        claims.release_step(database, held.pop())

    def sweep() -> None:
        fleet.beat_worker(database, play.worker_id, 0)
        claims.end_hopeless_steps(database, POLICY)
        claims.due_classes(database)
        schedules.fire_due(database, _admit, {}, max_variants=9)

    return {
        "claim a step": claim,
        "give it back": release,
        "which classes are due": lambda: claims.due_classes(database),
        "list jobs": lambda: views.list_jobs(database, TENANT, limit=_PAGE),
        "list the next page": lambda: views.list_jobs(database, TENANT, limit=_PAGE, before=middle),
        "list jobs by state": lambda: views.list_jobs(database, TENANT, states=states, limit=_QUEUED_PAGE),
        "list schedules": lambda: schedules.list_schedules(database, TENANT, limit=10),
        "submit a job": lambda: jobs.submit_job(database, TENANT, request, max_variants=256),
        "submit under quotas": lambda: jobs.submit_job(database, _BOUNDED, request, max_variants=256),
        "a worker's sweep": sweep,
        "a scrape: what is unfinished": lambda: read_counts(database),
        "a scrape: totals, kept for a while": lambda: read_totals(database),
    }


def _admit(request: JobRequest) -> JobRequest:
    return request


def measure(small: Database, large: Database, rounds: int) -> dict[str, dict[str, float]]:
    """Call every door on both ledgers in turn; return medians in seconds, and their ratio."""
    doors = {"small": make_doors(small), "large": make_doors(large)}
    samples: dict[str, dict[str, list[float]]] = {name: {"small": [], "large": []} for name in doors["small"]}
    for number in range(rounds + 3):
        for name, by_size in samples.items():
            for size, found in by_size.items():
                started = time.perf_counter()
                doors[size][name]()
                if number >= 3:  # the first calls prepare statements and warm caches
                    found.append(time.perf_counter() - started)
    table = {}
    for name, by_size in samples.items():
        medians = {f"{size}_s": statistics.median(found) for size, found in by_size.items()}
        table[name] = {**medians, "ratio": medians["large_s"] / medians["small_s"]}
    return table


@contextmanager
def filled_ledger(url: str, count: int) -> Iterator[Database]:
    """Yield a ledger with `count` jobs."""
    migrate(url)
    database = Database(url)
    started = time.monotonic()
    fill(database, count)
    print(f"  {count} jobs in {time.monotonic() - started:.0f} s", file=sys.stderr)
    try:
        yield database
    finally:
        database.close()


def main() -> None:
    """Fill, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=SMALL)
    parser.add_argument("--large", type=int, default=LARGE)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    given = parser.parse_args()
    figures: dict[str, Any] = {"small_jobs": given.small, "large_jobs": given.large, "rounds": given.rounds}
    with tempfile.TemporaryDirectory(prefix="ledger-size-") as folder, postgres_url() as server_url:
        urls = {
            "SQLite": lambda size: f"sqlite:///{folder}/{size}.db",
            "PostgreSQL": lambda _: make_database(server_url, f"edgekiln_size_{secrets.token_hex(4)}"),
        }
        for name, make_url_of in urls.items():
            print(name, file=sys.stderr)
            with (
                filled_ledger(make_url_of("small"), given.small) as small,
                filled_ledger(make_url_of("large"), given.large) as large,
            ):
                figures[name] = measure(small, large, given.rounds)
    print(f"| | | {given.small:,} jobs | {given.large:,} jobs | ratio |\n| --- | --- | --- | --- | --- |")
    for name in urls:
        for door, row in figures[name].items():
            print(
                f"| {name} | {door} | {row['small_s'] * 1000:.2f} ms | {row['large_s'] * 1000:.2f} ms "
                f"| {row['ratio']:.2f} |"
            )
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
