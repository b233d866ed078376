"""Schedules as their users meet them: over REST, in the SDK, on the command line, and in a worker's sweep."""

from __future__ import annotations

import datetime as dt
import json
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from service.api import schemas
from service.client import Client
from service.ledger import access, schedules
from service.ledger.clock import now
from service.ledger.tables import Schedule
from service.requests import parse_request
from service.sources import admit_source
from tests.api_world import World
from tests.ledger_play import TOOLCHAIN
from workers.process import WorkerProcess

PATIENCE_S = 60.0


def add(http: TestClient, world: World, name: str = "nightly", **fields: Any) -> dict[str, Any]:
    timing = fields if {"cron", "every_s"} & set(fields) else {"every_s": 3600, **fields}
    answer = http.post("/v1/schedules", json={"name": name, "job": {"source": world.source}, **timing})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def let_tick_come(world: World, schedule_id: str, late_s: float = 1.0) -> None:
    """Let the next tick have been due for `late_s`."""
    statement = update(Schedule).where(Schedule.id == schedule_id).values(next_at=now(-late_s))
    world.database.write(lambda tx: tx.connection.execute(statement) and None)


# --- REST ---------------------------------------------------------------------------------------


def test_a_schedule_is_added_listed_read_paused_resumed_and_removed(world: World, http: TestClient) -> None:
    made = http.post(
        "/v1/schedules",
        json={
            "name": "nightly",
            "cron": "0 3 * * *",
            "time_zone": "Europe/Berlin",
            "job": {"source": world.source, "recipes": ["none"]},
        },
    )
    schemas.ScheduleDocument.model_validate(made.json())
    path = made.headers["location"]
    assert http.get(path).json() == made.json()
    ticks = [dt.datetime.fromisoformat(tick) for tick in made.json()["next_ticks"]]
    assert len(ticks) == 5
    assert sorted(ticks) == ticks
    assert ticks[0] > dt.datetime.now(dt.UTC)
    listed = http.get("/v1/schedules").json()
    schemas.ScheduleList.model_validate(listed)
    assert [schedule["id"] for schedule in listed["schedules"]] == [made.json()["id"]]
    for action, state in (("pause", "paused"), ("pause", "paused"), ("resume", "active"), ("resume", "active")):
        answer = http.post(f"{path}/{action}")
        assert (answer.status_code, answer.json()["state"]) == (200, state)
    assert http.delete(path).status_code == 204
    assert http.get("/v1/schedules").json()["schedules"] == []
    assert http.get("/v1/jobs").json()["jobs"] == [], "nothing is submitted before a tick"


def test_pages_of_schedules_follow_each_other(world: World, http: TestClient) -> None:
    made = [add(http, world, f"number {number}")["id"] for number in range(5)]
    seen: list[str] = []
    before: str | None = None
    while True:
        page = http.get("/v1/schedules", params={"limit": 2, **({"before": before} if before else {})}).json()
        seen += [schedule["id"] for schedule in page["schedules"]]
        before = page["next"]
        if before is None:
            break
    assert sorted(seen) == sorted(made)


@pytest.mark.parametrize(
    ("fields", "status", "code", "words"),
    [
        ({"every_s": None}, 422, "invalid_request", "either cron or every_s"),
        ({"every_s": None, "cron": "61 * * * *"}, 422, "invalid_request", "bad minute"),
        ({"every_s": None, "cron": "0 3 * * *", "time_zone": "Europe/Berln"}, 422, "unknown_name", "'Europe/Berlin'"),
        ({"job": {"source": {"kind": "folder", "path": "/etc"}}}, 403, "folder_not_allowed", "/etc"),
        ({"api_key": "ek_secret"}, 422, "invalid_request", "api_key"),
        ({"name": "taken"}, 409, "conflict", "'taken' already"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_added(
    world: World, http: TestClient, fields: dict[str, Any], status: int, code: str, words: str
) -> None:
    add(http, world, "taken")
    document = {"name": "mine", "every_s": 3600, "job": {"source": world.source}, **fields}
    answer = http.post("/v1/schedules", json=document)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert words in answer.json()["detail"]
    assert len(http.get("/v1/schedules").json()["schedules"]) == 1


def test_tenants_see_nothing_of_each_other(world: World, http: TestClient) -> None:
    path = f"/v1/schedules/{add(http, world)['id']}"
    access.ensure_tenant(world.database, "other")
    headers = {"Authorization": f"Bearer {access.create_key(world.database, 'other', 'theirs').secret}"}
    assert http.get("/v1/schedules", headers=headers).json()["schedules"] == []
    answers = [http.get(path, headers=headers), http.delete(path, headers=headers)]
    answers += [http.post(f"{path}/{action}", headers=headers) for action in ("pause", "resume")]
    answers += [http.get("/v1/schedules", params={"before": path.rpartition("/")[2]}, headers=headers)]
    assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(404, "not_found")] * 5
    assert http.get(path).json()["state"] == "active"
    theirs = {"name": "nightly", "every_s": 3600, "job": {"source": world.source}}
    assert http.post("/v1/schedules", headers=headers, json=theirs).status_code == 201, "a name is a tenant's own"


# --- what a tick may read -----------------------------------------------------------------------


def test_the_folder_is_stored_as_it_was_resolved_and_looked_at_again(
    world: World, http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = world.models / "latest"
    link.symlink_to("tiny")
    answer = http.post(
        "/v1/schedules",
        json={"name": "mine", "every_s": 60, "job": {"source": {"kind": "folder", "path": str(link)}}},
    )
    assert answer.json()["job"]["source"]["path"] == str(world.models / "tiny")
    schedule_id = answer.json()["id"]
    (world.models / "tiny").rmdir()
    (world.models / "tiny").symlink_to("/etc")
    let_tick_come(world, schedule_id, 1)
    monkeypatch.setattr(schedules, "GRACE_S", 0.0)
    (tick,) = schedules.fire_due(
        world.database, lambda request: admit_source(request, world.settings), {}, max_variants=256
    )
    assert (tick.outcome, tick.error and tick.error["code"]) == ("refused", "folder_not_allowed")


def test_a_root_taken_back_is_not_read_any_more(
    world: World, http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule_id = add(http, world)["id"]
    let_tick_come(world, schedule_id, 1)
    monkeypatch.setattr(schedules, "GRACE_S", 0.0)
    closed = world.settings.model_copy(update={"source_roots": ()})
    (tick,) = schedules.fire_due(world.database, lambda request: admit_source(request, closed), {}, max_variants=256)
    assert tick.outcome == "refused"
    assert http.get("/v1/jobs").json()["jobs"] == []


def test_a_workers_sweep_fires_schedules(world: World, http: TestClient) -> None:
    schedule_id = add(http, world)["id"]
    let_tick_come(world, schedule_id)
    poked = threading.Event()
    settings = world.settings.model_copy(update={"sweep_s": 0.05})
    # Only the job's first step wakes anybody.
    process = WorkerProcess(settings, lambda classes: poked.set() if "fetch" in classes else None, TOOLCHAIN)
    try:
        process.start()
        assert poked.wait(PATIENCE_S)
    finally:
        process.close()
    (tick,) = http.get(f"/v1/schedules/{schedule_id}").json()["ticks"]
    assert tick["outcome"] == "submitted"
    assert http.get(f"/v1/jobs/{tick['job_id']}").json()["state"] == "queued"


# --- the SDK and the command line ---------------------------------------------------------------


def test_the_client_adds_and_changes_schedules(world: World, url: str) -> None:
    with Client(url) as client:
        job = parse_request({"source": world.source})
        made = client.add_schedule("hourly", job, every_s=3600, missed="skip", overlap="allow")
        assert (made["every_s"], made["missed"], made["overlap"], made["job"]) == (3600, "skip", "allow", job.to_json())
        assert client.pause_schedule(made["id"])["state"] == "paused"
        assert client.resume_schedule(made["id"])["state"] == "active"
        client.add_schedule("daily", {"source": world.source}, cron="0 3 * * *", time_zone="Asia/Tokyo")
        assert [schedule["name"] for schedule in client.schedules(page_size=1)] == ["daily", "hourly"]
        client.remove_schedule(made["id"])
        assert len(list(client.schedules())) == 1


def test_commands_add_list_show_pause_resume_and_remove(world: World, run: Callable[..., Any]) -> None:
    timing = ["--cron", "0 3 * * *", "--time-zone", "Europe/Berlin"]
    added = run("schedules", "add", world.source["path"], *timing, "--recipe", "none")
    assert added.exit_code == 0, added.stderr
    schedule_id = added.stdout.strip()
    assert "03:00 CE" in added.stderr
    assert run("schedules", "add", world.source["path"], "--every", "6h", "--name", "often", "--json").exit_code == 0
    table = run("schedules", "list").stdout
    assert "0 3 * * * (Europe/Berlin)" in table
    assert "every 6h" in table
    assert [schedule["name"] for schedule in json.loads(run("schedules", "list", "--json").stdout)] == ["often", "tiny"]
    let_tick_come(world, schedule_id)
    schedules.fire_due(world.database, lambda request: request, {}, max_variants=256)
    shown = run("schedules", "show", schedule_id).stdout
    assert f"tiny: {world.source['path']}, 0 3 * * * (Europe/Berlin), active" in shown
    assert shown.count("next: ") == 5
    assert re.search(r"submitted +job_", shown)
    assert json.loads(run("schedules", "show", schedule_id, "--json").stdout)["ticks"][0]["outcome"] == "submitted"
    assert "paused." in run("schedules", "pause", schedule_id).stderr
    assert "active. Next: " in run("schedules", "resume", schedule_id).stderr
    assert "is removed." in run("schedules", "remove", schedule_id).stderr
    assert run("schedules", "show", schedule_id).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--every", "often"], "'often' is not a span of time"),
        (["--cron", "0 3 * *"], "must have five fields"),
        (["--cron", "0 3 * * *", "--time-zone", "Berlin"], "Did you mean 'Europe/Berlin'?"),
        ([], "either cron or every_s"),
        (["--every", "1h", "--recipe", "int3"], "Unknown recipe 'int3'"),
    ],
)
def test_commands_refuse_what_cannot_work(
    world: World, run: Callable[..., Any], arguments: list[str], words: str
) -> None:
    result = run("schedules", "add", world.source["path"], *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
