"""Schedules: each tick fired once, whoever comes, whatever the clock does, and whatever crashes."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import func, select, true, update

from service.errors import Conflict, FolderNotAllowed, InvalidRequest, NotFound, UploadNotFound
from service.ledger import access, jobs, schedules
from service.ledger.clock import now
from service.ledger.database import Database, Transaction
from service.ledger.schedules import Tick
from service.ledger.tables import Job, Schedule
from service.requests import JobRequest
from service.schedules import ScheduleRequest
from tests import schedule_beat
from tests.ledger_clock import LedgerClock
from tests.ledger_play import TENANT, Play

JOB = {"source": {"kind": "folder", "path": "/models/tiny"}, "recipes": ["none"]}
Admit = Callable[[JobRequest], JobRequest]


def admit_all(request: JobRequest) -> JobRequest:
    return request


class Bench:
    """A ledger, its clock, and a worker that fires what is due."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.clock = LedgerClock(database, "2026-11-21 12:00:00")
        self.play = Play(database)
        self.refusals: schedules.Refusals = {}

    def add(self, name: str = "nightly", **fields: Any) -> str:
        request = ScheduleRequest.model_validate({"name": name, "job": JOB, **fields})
        return schedules.add_schedule(self.database, TENANT, request, max_variants=256)

    def fire(self, admit: Admit = admit_all, max_variants: int = 256) -> list[Tick]:
        return schedules.fire_due(self.database, admit, self.refusals, max_variants=max_variants)

    def outcomes(self, admit: Admit = admit_all, max_variants: int = 256) -> list[str]:
        return [str(tick.outcome) for tick in self.fire(admit, max_variants)]

    def show(self, schedule_id: str) -> dict[str, Any]:
        return schedules.read_schedule(self.database, TENANT, schedule_id)

    def count_jobs(self) -> int:
        return count_jobs(self.database)


def count_jobs(database: Database) -> int:
    count: int = database.read(lambda connection: connection.execute(select(func.count(Job.id))).scalar_one())
    return count


@pytest.fixture
def bench(database: Database) -> Bench:
    return Bench(database)


def test_schedules_that_wait_for_another_worker_hold_up_nobody(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "_BATCH", 2)
    for number in range(5):
        bench.add(f"unreadable {number}", every_s=60, job={**JOB, "source": {"kind": "folder", "path": "/gone"}})
    bench.add("readable", every_s=60)

    def admit(request: JobRequest) -> JobRequest:
        if request.to_json()["source"]["path"] == "/gone":
            raise FolderNotAllowed("Not here.")
        return request

    bench.clock.set("2026-11-21 12:01:00")
    assert [tick.name for tick in bench.fire(admit)] == ["readable"]


@pytest.mark.parametrize("name", ["a\0b", "a\x1b[31m", ""])
def test_a_name_can_be_stored_and_shown(bench: Bench, name: str) -> None:
    with pytest.raises(ValidationError):
        bench.add(name, every_s=60)


# --- ticks --------------------------------------------------------------------------------------


def test_a_tick_submits_the_job_once_its_time_has_come(bench: Bench) -> None:
    schedule_id = bench.add(cron="30 13 * * *", time_zone="Europe/Berlin")
    bench.clock.set("2026-11-21 12:29:59.9")
    assert bench.fire() == []
    bench.clock.set("2026-11-21 12:30:00")
    (tick,) = bench.fire()
    assert (tick.name, tick.outcome) == ("nightly", "submitted")
    assert tick.job_id is not None
    job = bench.play.job(tick.job_id)
    assert (job["state"], job["request"]["recipes"]) == ("queued", ["none"])
    assert bench.fire() == [], "once"
    shown = bench.show(schedule_id)
    assert shown["next_ticks"][:2] == ["2026-11-22T12:30:00+00:00", "2026-11-23T12:30:00+00:00"]
    assert [(past["tick_at"], past["job_id"]) for past in shown["ticks"]] == [("2026-11-21T12:30:00+00:00", job["id"])]


def test_a_fired_tick_wakes_the_workers(database: Database) -> None:
    bench = Bench(database)
    bench.add(every_s=60)
    bench.clock.pass_time(seconds=60)
    pokes: list[list[str]] = []
    database.poke = lambda classes: pokes.append(list(classes))
    bench.fire()
    assert pokes == [["fetch"]]


def test_intervals_go_on_from_when_the_schedule_was_made(bench: Bench) -> None:
    bench.add(every_s=600, overlap="allow")
    fired = []
    for _ in range(60):
        bench.clock.pass_time(minutes=1)
        fired += [tick.tick_at.minute for tick in bench.fire()]
    assert fired == [10, 20, 30, 40, 50, 0]


@pytest.mark.parametrize(
    ("night", "fired"),
    [
        ("2026-03-28 23:00", ["01:00"]),  # 2:30 is left out: 3:00 in summer time
        ("2026-10-24 23:00", ["00:30"]),  # 2:30 comes twice: the first, in summer time
    ],
)
def test_the_night_that_has_an_hour_less_or_more_has_one_tick(bench: Bench, night: str, fired: list[str]) -> None:
    bench.clock.set(f"{night}:00")
    bench.add(cron="30 2 * * *", time_zone="Europe/Berlin", overlap="allow")
    seen = []
    for _ in range(18):
        bench.clock.pass_time(minutes=20)
        seen += [f"{tick.tick_at:%H:%M}" for tick in bench.fire()]
    assert seen == fired


# --- many beats ---------------------------------------------------------------------------------


def fire_together(bench: Bench, beats: int) -> list[Tick]:
    """Let several workers, each with connections of its own, read the same tick before any of them fires it."""
    barrier = threading.Barrier(beats)

    def beat() -> list[Tick]:
        database = Database(bench.database.url)
        bench.clock.lead(database)
        try:
            return schedules.fire_due(database, meet, {}, max_variants=256)
        finally:
            database.close()

    def meet(request: JobRequest) -> JobRequest:
        barrier.wait(60)
        return request

    with ThreadPoolExecutor(beats) as pool:
        futures = [pool.submit(beat) for _ in range(beats)]
        return [tick for future in futures for tick in future.result()]


@pytest.mark.parametrize("beats", [2, 10])
def test_however_many_beats_meet_a_tick_is_fired_once(bench: Bench, beats: int) -> None:
    schedule_id = bench.add(every_s=3600, overlap="allow")
    for hour in range(1, 4):
        bench.clock.pass_time(hours=1)
        assert len(fire_together(bench, beats)) == 1
        assert (bench.count_jobs(), len(bench.show(schedule_id)["ticks"])) == (hour, hour)


@pytest.mark.parametrize("beats", [2, 10])
def test_control_without_the_guard_each_beat_submits_a_job(
    bench: Bench, beats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "_is_unfired", lambda _due: true())
    bench.add(every_s=3600, overlap="allow")
    bench.clock.pass_time(hours=1)
    assert len(fire_together(bench, beats)) == beats
    assert bench.count_jobs() == beats


@pytest.mark.parametrize("beats", [2, 10])
def test_processes_that_meet_fire_each_schedule_once(database: Database, beats: int) -> None:
    """By the database's own clock; each process reads every schedule before any of them fires it."""
    Play(database)
    for name in ("one", "two", "three"):
        request = ScheduleRequest.model_validate({"name": name, "every_s": 60, "job": JOB})
        put_back(database, schedules.add_schedule(database, TENANT, request, max_variants=256))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([schedule_beat.__name__])
    with ProcessPoolExecutor(beats, context, schedule_beat.join, (context.Barrier(beats),)) as pool:
        assert sum(pool.map(schedule_beat.beat, [database.url] * beats)) == 3
    assert count_jobs(database) == 3


def put_back(database: Database, schedule_id: str) -> None:
    """Let a schedule's next tick have come a minute ago."""

    def change(tx: Transaction) -> None:
        tx.connection.execute(update(Schedule).where(Schedule.id == schedule_id).values(next_at=now(-60)))

    database.write(change)


class Crash(BaseException):
    """The process is gone."""


def test_a_crash_after_the_job_was_written_fires_nothing_and_the_next_sweep_does(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*arguments: Any, **options: Any) -> str:
        jobs.add_job(*arguments, **options)
        raise Crash

    schedule_id = bench.add(every_s=3600)
    bench.clock.pass_time(hours=1)
    monkeypatch.setattr(schedules, "add_job", crash)
    with pytest.raises(Crash):
        bench.fire()
    assert (bench.count_jobs(), bench.show(schedule_id)["ticks"]) == (0, [])
    monkeypatch.undo()
    assert bench.outcomes() == ["submitted"]
    assert bench.count_jobs() == 1


# --- clocks that jump, and ticks that were missed -----------------------------------------------


@pytest.mark.parametrize(("missed", "fired"), [("once", ["submitted"]), ("skip", ["missed"])])
def test_what_was_missed_is_made_up_for_once_or_not_at_all(bench: Bench, missed: str, fired: list[str]) -> None:
    schedule_id = bench.add(every_s=3600, missed=missed, overlap="allow")
    bench.clock.pass_time(hours=1)
    assert bench.outcomes() == ["submitted"], "control: in time"
    bench.clock.pass_time(days=3, minutes=30)
    assert bench.outcomes() == fired
    assert bench.fire() == []
    assert bench.show(schedule_id)["next_ticks"][0] == "2026-11-24T14:00:00+00:00"
    bench.clock.set("2026-11-24 14:00:07")
    assert bench.outcomes() == ["submitted"], "and goes on"


def test_the_last_of_those_missed_is_fired_if_it_is_in_time(bench: Bench) -> None:
    bench.add(every_s=3600, missed="skip")
    bench.clock.set("2026-11-24 14:04:00")
    (tick,) = bench.fire()
    assert (tick.outcome, f"{tick.tick_at:%d %H:%M}") == ("submitted", "24 14:00")
    assert bench.fire() == []


def test_a_clock_that_goes_back_fires_no_tick_again(bench: Bench) -> None:
    bench.add(every_s=3600, overlap="allow")
    bench.clock.set("2026-11-21 14:00:00")
    assert bench.outcomes() == ["submitted"]
    for instant in ("13:59:59.5", "13:00:00", "14:00:00", "14:00:01", "02:00:00", "14:30:00"):
        bench.clock.set(f"2026-11-21 {instant}")
        assert bench.fire() == [], instant
    bench.clock.set("2026-11-21 15:00:00")
    assert bench.outcomes() == ["submitted"]
    assert bench.count_jobs() == 2


def test_after_a_clock_that_was_years_ahead_a_schedule_is_put_right_by_resuming_it(bench: Bench) -> None:
    schedule_id = bench.add(cron="0 3 * * *")
    bench.clock.set("2036-01-01 12:00:00")
    assert bench.outcomes() == ["submitted"]
    bench.clock.set("2026-11-22 12:00:00")
    assert bench.fire() == []
    schedules.resume_schedule(bench.database, TENANT, schedule_id)
    assert bench.show(schedule_id)["next_ticks"][0] == "2026-11-23T03:00:00+00:00"


# --- policies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("overlap", "second"), [("skip", "skipped"), ("allow", "submitted")])
def test_a_tick_meets_the_unfinished_job_of_the_last(bench: Bench, overlap: str, second: str) -> None:
    bench.add(every_s=3600, overlap=overlap)
    bench.clock.pass_time(hours=1)
    assert bench.outcomes() == ["submitted"]
    bench.clock.pass_time(hours=1)
    assert bench.outcomes() == [second]
    bench.clock.pass_time(hours=1)
    assert bench.outcomes() == [second], "it is still unfinished, two ticks ago"
    for job in read_job_ids(bench):
        jobs.cancel_job(bench.database, TENANT, job)
    bench.clock.pass_time(hours=1)
    assert bench.outcomes() == ["submitted"]


def read_job_ids(bench: Bench) -> list[str]:
    return bench.database.read(lambda connection: list(connection.execute(select(Job.id)).scalars()))


def test_nothing_is_fired_while_a_schedule_is_paused_and_nothing_is_made_up_for(bench: Bench) -> None:
    schedule_id = bench.add(every_s=3600)
    schedules.pause_schedule(bench.database, TENANT, schedule_id)
    bench.clock.pass_time(hours=5, minutes=10)
    assert bench.fire() == []
    paused = bench.show(schedule_id)
    assert (paused["state"], paused["next_ticks"]) == ("paused", [])
    schedules.resume_schedule(bench.database, TENANT, schedule_id)
    assert bench.fire() == []
    resumed = bench.show(schedule_id)
    assert (resumed["state"], resumed["next_ticks"][0]) == ("active", "2026-11-21T18:00:00+00:00")


def test_a_schedule_paused_between_look_and_fire_is_not_fired(bench: Bench) -> None:
    schedule_id = bench.add(every_s=3600)
    bench.clock.pass_time(hours=1)

    def pause(request: JobRequest) -> JobRequest:
        schedules.pause_schedule(bench.database, TENANT, schedule_id)
        return request

    assert bench.fire(pause) == []
    assert bench.count_jobs() == 0


def test_a_removed_schedule_leaves_its_jobs(bench: Bench) -> None:
    schedule_id = bench.add(every_s=3600)
    bench.clock.pass_time(hours=1)
    bench.fire()
    schedules.remove_schedule(bench.database, TENANT, schedule_id)
    bench.clock.pass_time(hours=1)
    assert (bench.fire(), bench.count_jobs()) == ([], 1)
    with pytest.raises(NotFound, match="edgekiln schedules list"):
        bench.show(schedule_id)
    bench.add(every_s=3600)


def refuse(_request: JobRequest) -> JobRequest:
    raise FolderNotAllowed("Not here.")


def test_a_folder_that_one_worker_may_not_read_is_left_to_others_for_a_while(bench: Bench) -> None:
    schedule_id = bench.add(every_s=3600)
    bench.clock.set("2026-11-21 13:00:01")
    assert bench.fire(refuse) == []
    bench.clock.set("2026-11-21 13:04:59")
    assert bench.fire(refuse) == []
    assert bench.outcomes() == ["submitted"], "another worker"
    bench.clock.set("2026-11-21 14:00:01")
    assert bench.fire(refuse) == []
    bench.clock.set("2026-11-21 14:05:01")
    assert bench.outcomes(refuse) == ["refused"]
    assert bench.show(schedule_id)["ticks"][0]["error"]["message"] == "Not here."
    assert bench.count_jobs() == 1


def test_after_an_outage_the_first_worker_back_leaves_to_others_what_it_may_not_read(bench: Bench) -> None:
    bench.add(every_s=3600)
    bench.clock.pass_time(hours=1, minutes=10)
    assert bench.fire(refuse) == []
    bench.clock.pass_time(minutes=4)
    assert bench.fire(refuse) == []
    assert bench.outcomes() == ["submitted"]
    # Each tick has its own time.
    assert bench.fire(refuse) == [] == list(bench.refusals)
    bench.clock.pass_time(minutes=50)
    assert bench.fire(refuse) == []
    bench.clock.pass_time(minutes=5)
    assert bench.outcomes(refuse) == ["refused"]


def test_a_job_that_may_no_longer_be_submitted_is_refused_and_the_schedule_goes_on(bench: Bench) -> None:
    schedule_id = bench.add(every_s=3600, job={**JOB, "recipes": ["none", "float16"]})
    bench.clock.pass_time(hours=1)
    assert bench.outcomes(max_variants=1) == ["refused"]
    (tick,) = bench.show(schedule_id)["ticks"]
    assert (tick["job_id"], tick["error"]["code"]) == (None, "invalid_request")
    assert bench.count_jobs() == 0
    bench.clock.pass_time(hours=1)
    assert bench.outcomes() == ["submitted"]


def test_what_can_never_be_submitted_is_not_scheduled(bench: Bench) -> None:
    bench.add(every_s=3600)
    with pytest.raises(Conflict, match="'nightly' already"):
        bench.add(every_s=3600)
    with pytest.raises(UploadNotFound):
        bench.add("other", every_s=3600, job={**JOB, "evaluation": "0" * 64})
    request = ScheduleRequest.model_validate({"name": "large", "every_s": 60, "job": JOB})
    with pytest.raises(InvalidRequest, match="1 variants; one job may have 0"):
        schedules.add_schedule(bench.database, TENANT, request, max_variants=0)
    assert [schedule["name"] for schedule in schedules.list_schedules(bench.database, TENANT)] == ["nightly"]


def test_the_last_ticks_are_remembered(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "_TICKS_KEPT", 3)
    schedule_id = bench.add(every_s=3600)
    for _ in range(5):
        bench.clock.pass_time(hours=1)
        bench.fire()
    ticks = bench.show(schedule_id)["ticks"]
    skipped = [(f"{hour}:00", "skipped") for hour in (17, 16, 15)]
    # The first one's job has not ended, and is what the others are skipped for.
    assert [(tick["tick_at"][11:16], tick["outcome"]) for tick in ticks] == [*skipped, ("13:00", "submitted")]
    (job_id,) = read_job_ids(bench)
    jobs.cancel_job(bench.database, TENANT, job_id)
    bench.clock.pass_time(hours=1)
    bench.fire()
    assert [tick["tick_at"][11:16] for tick in bench.show(schedule_id)["ticks"]] == ["18:00", "17:00", "16:00"]
    (listed,) = schedules.list_schedules(bench.database, TENANT)
    assert (listed["last_tick"]["outcome"], listed["last_tick"]["tick_at"][11:16]) == ("submitted", "18:00")


def test_a_schedule_fires_for_its_tenant_alone(bench: Bench) -> None:
    access.ensure_tenant(bench.database, "other")
    request = ScheduleRequest.model_validate({"name": "nightly", "every_s": 60, "job": JOB})
    theirs = schedules.add_schedule(bench.database, "other", request, max_variants=256)
    mine = bench.add(every_s=60)
    assert [schedule["id"] for schedule in schedules.list_schedules(bench.database, TENANT)] == [mine]
    for change in (schedules.pause_schedule, schedules.resume_schedule, schedules.remove_schedule):
        with pytest.raises(NotFound):
            change(bench.database, TENANT, theirs)
    bench.clock.pass_time(minutes=1)
    bench.fire()
    owners = bench.database.read(lambda connection: list(connection.execute(select(Job.tenant_id)).scalars()))
    assert sorted(owners) == ["default", "other"]
