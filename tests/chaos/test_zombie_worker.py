"""A worker that is stopped past its lease while it runs a step, and wakes when another has done its work."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

from service.ledger.tables import Attempt, Event, Job, Publication, Step, StepOutput, Variant
from tests.chaos.conftest import Fire
from tests.kiln import Kiln, check_published_once, wait_for

#: What a lost attempt has cost may be entered later; it changes no state.
_COSTS = {"duration_s", "peak_rss_bytes", "peak_anon_bytes", "isolation", "log_digest"}


def test_a_worker_that_wakes_after_its_lease_writes_nothing(fire: Fire, checkpoint: Path) -> None:
    kiln = fire()
    job_id = kiln.submit(checkpoint, recipes=["none", "dynamic_int8"], formats=["tflite"])
    wait_for(lambda: (kiln.step(job_id, "plan") or {}).get("state") == "running", "plan runs")
    zombie = kiln.worker_pid
    assert zombie is not None
    stop_between_transactions(kiln, zombie)
    wait_for(lambda: not kiln.step_pids(), "its child, which nobody has stopped, has answered and ended")

    start_second_worker(kiln)
    job = kiln.finished(job_id)
    assert job["state"] == "succeeded", job
    assert kiln.attempts(job_id)["plan"] == ["lost", "succeeded"]
    before = read_state(kiln)

    os.kill(zombie, signal.SIGCONT)
    plan = kiln.step(job_id, "plan")
    assert plan is not None
    endings = ("lost; nothing was written", "stopped: cancelled or taken over")
    about = f" step={plan['id']} kind=plan"
    wait_for(lambda: any(ending + about in kiln.worker_log for ending in endings), "the zombie has noticed")

    assert kiln.worker_pid == zombie
    assert read_state(kiln) == before
    check_published_once(kiln.database, kiln.data_dir / "store", job_id)


def stop_between_transactions(kiln: Kiln, pid: int) -> None:
    """Stop a worker while it does not hold the one lock that SQLite has."""

    def stopped() -> bool:
        os.kill(pid, signal.SIGSTOP)
        connection = sqlite3.connect(kiln.data_dir / "ledger.db", timeout=0.5, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        except sqlite3.OperationalError:
            os.kill(pid, signal.SIGCONT)
            return False
        finally:
            connection.close()
        return True

    wait_for(stopped, "the worker is stopped")


def start_second_worker(kiln: Kiln) -> None:
    """Start another worker of the same data directory, as an operator would."""
    command = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "--pool=threads", "--concurrency=4"]
    command += ["-Q", "fetch,convert,light,device", "-n", "second@%h", "--without-gossip", "--without-mingle"]
    with (kiln.folder / "second.log").open("ab") as log:
        # The kiln's folder is in its environment, by which it is found and ended.
        second = subprocess.Popen(command, env=kiln.environment, cwd=kiln.folder, stdout=log, stderr=log)
    kiln.also_wait_for(second)


def read_state(kiln: Kiln) -> dict[str, Any]:
    """Return everything that a stale write could change."""
    tables = (Job, Variant, Step, StepOutput, Publication, Event, Attempt)
    return {
        table.__tablename__: [
            {name: value for name, value in row.items() if name not in _COSTS} for row in kiln.rows(table)
        ]
        for table in tables
    }
