"""Several hosts' worker processes on one ledger: cancelling, ending, draining and replacing them while they work.

Leases outlast every test: what happens in time is owed to the message, the poll or the signal, not to a lease's end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import inspect, update

from service.ledger.clock import now
from service.ledger.tables import Worker
from service.queue import make_app
from service.settings import load_settings
from tests.kiln import wait_for
from tests.light_fleet import LONG_LEASE, LightFleet, light_fleet

#: A worker of one class; it has no slot for others.
FETCH_ONLY = {"convert_slots": 0, "light_slots": 0, "device_slots": 0}
NO_CONVERT = {"convert_slots": 0, "device_slots": 0}


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LightFleet]:
    with light_fleet(tmp_path, **LONG_LEASE) as made:
        yield made


def test_a_child_on_another_host_is_ended_by_a_cancellation_and_given_back_by_a_shutdown(fleet: LightFleet) -> None:
    fleet.start_worker("one", **FETCH_ONLY)
    second = fleet.start_worker("two")
    job_id = fleet.submit(fleet.write_model("held", hold="convert"))
    step = fleet.wait_running(job_id, "convert")
    wait_for(lambda: fleet.client.logs(job_id, "convert")[0]["text"], "what it prints is shown while it runs")

    # SIGTERM: the step goes on elsewhere at once, long before its lease ends.
    fleet.start_worker("three")
    fleet.stop(second)
    wait_for(lambda: len(fleet.attempts(step["id"])) == 2, "another host has taken the step up")
    assert fleet.attempts(step["id"]) == [("two", "released"), ("three", "running")]
    assert fleet.read_step(step["id"]).failure_count == 0

    wait_for(lambda: fleet.step_pids(), "its child is there")
    fleet.client.cancel(job_id)
    wait_for(lambda: not fleet.step_pids(), "the child of another host has been killed")
    assert fleet.attempts(step["id"])[-1] == ("three", "cancelled")
    # What it printed is not lost with it.
    followed = "".join(fleet.client.follow_logs(job_id, "convert"))
    assert followed.count("convert holds") == 2

    # The worker is free for others.
    job = fleet.client.wait(fleet.submit(fleet.write_model("next")))
    assert job["state"] == "succeeded", job


def test_a_drained_worker_finishes_what_it_runs_and_takes_nothing_more(fleet: LightFleet) -> None:
    fleet.start_worker("one")
    (worker_id,) = fleet.worker_ids("one")
    held = fleet.submit(fleet.write_model("held", hold="convert"))
    step = fleet.wait_running(held, "convert")
    fleet.client.drain_worker(worker_id)
    fleet.start_worker("two")
    job_id = fleet.submit(fleet.write_model("next"))
    assert fleet.client.wait(job_id)["state"] == "succeeded"
    assert fleet.hosts_of(job_id) == {"two"}
    assert fleet.attempts(step["id"]) == [("one", "running")], "it goes on where it was"
    fleet.client.cancel(held)


def test_an_upgrade_of_the_tools_fails_no_job(fleet: LightFleet) -> None:
    old = fleet.start_worker("one", tools="old", **NO_CONVERT)
    job_id = fleet.submit(fleet.write_model("upgraded"))
    convert = wait_for(
        lambda: next((step for step in fleet.client.get(job_id)["steps"] if step["kind"] == "convert"), None), "a plan"
    )
    fleet.stop(old)
    # An hour passes.
    with fleet.database.engine.begin() as connection:
        connection.execute(update(Worker).values(heartbeat_at=now(-3600)))
    fleet.start_worker("two", tools="new")

    job = fleet.client.wait(job_id)
    assert job["state"] == "succeeded", job
    (converted,) = [step for step in job["steps"] if step["kind"] == "convert"]
    assert converted["key"] != convert["key"]
    assert fleet.read_step(convert["id"]).state == "cancelled"
    (fetched,) = [step for step in job["steps"] if step["kind"] == "fetch"]
    assert fleet.attempts(fetched["id"]) == [("one", "succeeded")], "what was finished is kept"


def migrate_further(fleet: LightFleet) -> None:
    """Do to every table what a migration of the next version may do to it (`tests/migration/test_rolling.py`)."""
    tables = inspect(fleet.database.engine).get_table_names()
    with fleet.database.engine.begin() as connection:
        for table in tables:
            if table != "alembic_version":
                connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN newer_fact TEXT")
                connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN newer_count INTEGER DEFAULT 0 NOT NULL")
        connection.exec_driver_sql("CREATE TABLE newer (id TEXT PRIMARY KEY)")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'newer'")


def test_processes_of_the_version_before_go_on_with_the_new_schema(fleet: LightFleet) -> None:
    """These are the old ones: what the schema gets in the midst of their work is the next version's."""
    fleet.start_worker("one", **NO_CONVERT)
    before = fleet.submit(fleet.write_model("before"))
    wait_for(lambda: any(step["kind"] == "convert" for step in fleet.client.get(before)["steps"]), "a plan")
    migrate_further(fleet)
    after = fleet.submit(fleet.write_model("after"))
    # Started again, as by an orchestrator in the midst of the upgrade.
    fleet.start_worker("two")
    for job_id in (before, after):
        assert fleet.client.wait(job_id)["state"] == "succeeded"
    assert "one" in fleet.hosts_of(before)
    assert "two" in fleet.hosts_of(after)
    assert "a newer version has migrated the ledger" in fleet.log


def test_a_worker_understands_the_messages_of_the_version_before(fleet: LightFleet) -> None:
    job_id = fleet.submit(fleet.write_model("asked"))
    fleet.start_worker("one", sweep_s=3600)
    settings = load_settings({"data_dir": fleet.folder / "data"})
    with make_app(settings) as app:
        # As 0.1.0 writes them, word by word: names of tasks and queues, and their arguments, are wire format.
        app.send_task("ledger.prune", queue="light", ignore_result=True)
        # What a message says beside the class is passed over.
        app.send_task("step.run", args=("fetch",), queue="fetch", headers={"unheard": "of"}, ignore_result=True)
    assert fleet.client.wait(job_id)["state"] == "succeeded"
    assert "unregistered task" not in fleet.log.lower()
