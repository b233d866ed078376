"""When the ticks of a schedule are: on ordinary days, in the two nights of the year, and for whatever may be asked."""

from __future__ import annotations

import datetime as dt
import itertools
import zoneinfo
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import InvalidRequest, UnknownName
from service.requests import invalid_request
from service.schedules import ScheduleRequest, Timing, read_ticks

JOB = {"source": {"kind": "folder", "path": "/models/tiny"}}
ANCHOR = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def at(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)


def clock_ticks(cron: str, time_zone: str, after: str, count: int) -> list[str]:
    """The ticks after an instant, in UTC, as the zone's clock shows them."""
    ticks = itertools.islice(Timing(cron, time_zone, None, ANCHOR).ticks_after(at(after)), count)
    return [tick.astimezone(zoneinfo.ZoneInfo(time_zone)).strftime("%d %H:%M %z") for tick in ticks]


def test_a_cron_expression_is_read_by_the_clock_of_its_zone() -> None:
    assert clock_ticks("0 3 * * *", "Europe/Berlin", "2026-01-10 02:00", 2) == ["11 03:00 +0100", "12 03:00 +0100"]
    assert clock_ticks("0 3 * * *", "Europe/Berlin", "2026-07-10 01:00", 2) == ["11 03:00 +0200", "12 03:00 +0200"]
    assert clock_ticks("30 6 * * mon-fri", "UTC", "2026-11-20 12:00", 2) == ["23 06:30 +0000", "24 06:30 +0000"]


@pytest.mark.parametrize(
    ("cron", "zone", "after", "shown"),
    [
        # 2:00 to 3:00 is left out on the 29th: the tick comes when the clocks have been put forward.
        ("30 2 * * *", "Europe/Berlin", "2026-03-27 12:00", ["28 02:30 +0100", "29 03:00 +0200", "30 02:30 +0200"]),
        ("0 2 * * SUN", "America/New_York", "2026-03-02 00:00", ["08 03:00 -0400", "15 02:00 -0400", "22 02:00 -0400"]),
        # Two ticks fall into one.
        ("0 2,3 * * *", "Europe/Berlin", "2026-03-28 12:00", ["29 03:00 +0200", "30 02:00 +0200", "30 03:00 +0200"]),
        # The day begins at 1:00 there.
        ("0 0 * * *", "America/Havana", "2026-03-07 12:00", ["08 01:00 -0400", "09 00:00 -0400", "10 00:00 -0400"]),
        # Half an hour is left out.
        ("15 2 * * *", "Australia/Lord_Howe", "2026-10-02 17:00", ["04 02:30 +1100", "05 02:15 +1100"]),
    ],
)
def test_a_tick_that_does_not_exist_comes_once_after_the_jump(
    cron: str, zone: str, after: str, shown: list[str]
) -> None:
    assert clock_ticks(cron, zone, after, len(shown)) == shown


@pytest.mark.parametrize(
    ("cron", "zone", "after", "shown"),
    [
        ("30 2 * * *", "Europe/Berlin", "2026-10-24 12:00", ["25 02:30 +0200", "26 02:30 +0100"]),
        ("0 1 * * *", "America/New_York", "2026-10-31 12:00", ["01 01:00 -0400", "02 01:00 -0500"]),
        ("45 1 * * *", "Australia/Lord_Howe", "2026-04-04 12:00", ["05 01:45 +1100", "06 01:45 +1030"]),
    ],
)
def test_a_tick_that_occurs_twice_comes_once(cron: str, zone: str, after: str, shown: list[str]) -> None:
    assert clock_ticks(cron, zone, after, len(shown)) == shown


def test_from_within_the_repeated_hour_the_next_tick_is_not_in_the_past() -> None:
    """At 2:10 the second time, 2:30 lies ahead on the clock, and was there 40 minutes ago."""
    assert clock_ticks("30 2 * * *", "Europe/Berlin", "2026-10-25 01:10", 1) == ["26 02:30 +0100"]


def test_what_is_asked_for_by_every_hour_or_minute_goes_on_in_real_time() -> None:
    spring = clock_ticks("0 * * * *", "Europe/Berlin", "2026-03-29 00:30", 2)
    assert spring == ["29 03:00 +0200", "29 04:00 +0200"]
    autumn = clock_ticks("*/30 * * * *", "Europe/Berlin", "2026-10-25 00:10", 4)
    assert autumn == ["25 02:30 +0200", "25 02:00 +0100", "25 02:30 +0100", "25 03:00 +0100"]


def test_intervals_count_from_when_the_schedule_was_made() -> None:
    timing = Timing(None, "UTC", 3600, at("2026-01-01 00:10:20.700"))
    assert timing.next_after(at("2026-01-01 00:10:20.700")) == at("2026-01-01 01:10:20")
    assert timing.next_after(at("2026-01-01 01:10:20")) == at("2026-01-01 02:10:20")
    assert timing.next_after(at("2026-03-01 12:00")) == at("2026-03-01 12:10:20")
    assert timing.next_after(at("2025-12-01 12:00")) == at("2026-01-01 01:10:20"), "never before the first"
    assert [tick.hour for tick in read_ticks(timing, at("2026-01-01 01:10:20"), 3)] == [1, 2, 3]


FIELDS = st.tuples(
    st.sampled_from(["*", "*/7", "0", "30", "5,35", "10-20/3"]),
    st.sampled_from(["*", "*/5", "0", "1", "2", "3", "1-4", "23"]),
    st.sampled_from(["*", "1", "29", "L", "*/10"]),
    st.sampled_from(["*", "3,10,11", "4-9"]),
    st.sampled_from(["*", "SUN", "MON-FRI", "6#2"]),
)
ZONES = st.sampled_from(
    ["UTC", "Europe/Berlin", "America/New_York", "America/Havana", "Australia/Lord_Howe", "Africa/Casablanca"]
)
INSTANTS = st.datetimes(dt.datetime(2015, 1, 1), dt.datetime(2035, 1, 1), timezones=st.just(dt.UTC))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(FIELDS, ZONES, INSTANTS, st.timedeltas(dt.timedelta(0), dt.timedelta(days=40)))
def test_ticks_go_forward_and_none_is_passed_over(
    fields: tuple[str, ...], zone: str, instant: dt.datetime, further: dt.timedelta
) -> None:
    timing = Timing(" ".join(fields), zone, None, ANCHOR)
    tick = timing.next_after(instant)
    assert tick > instant
    assert (tick.tzinfo, tick.second, tick.microsecond) == (dt.UTC, 0, 0)
    later = timing.next_after(instant + further)
    assert later >= tick, "who asks later is not told of an earlier tick"
    assert (later == tick) == (instant + further < tick), "whoever asks before it is told of the same tick"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(60, 10**7), INSTANTS, INSTANTS)
def test_intervals_have_one_length(every_s: int, anchor: dt.datetime, instant: dt.datetime) -> None:
    timing = Timing(None, "UTC", every_s, anchor)
    first, second = itertools.islice(timing.ticks_after(instant), 2)
    assert first > instant
    assert second - first == dt.timedelta(seconds=every_s)


def request(**fields: Any) -> ScheduleRequest:
    return ScheduleRequest.model_validate({"name": "nightly", "job": JOB, **fields})


def refusal(**fields: Any) -> str:
    with pytest.raises(Exception, match=r".") as caught:
        request(**fields)
    error: Any = caught.value
    return str(error if isinstance(error, InvalidRequest) else invalid_request(error.errors()))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "either cron or every_s"),
        ({"cron": "0 3 * * *", "every_s": 60}, "either cron or every_s"),
        ({"cron": "0 3 * *"}, "must have five fields"),
        ({"cron": "0 0 3 * * *"}, "must have five fields"),
        ({"cron": "60 3 * * *"}, "cron '60 3 * * *': bad minute"),
        ({"cron": "0 3 * * someday"}, "bad day-of-week"),
        ({"cron": "0 3 30 2 *"}, "bad day-of-month"),
        ({"cron": "0 3 29 2 */6", "time_zone": "Mars"}, "Unknown time zone 'Mars'"),
        ({"cron": "*" * 300}, "at most 200 characters"),
        ({"every_s": 59}, "greater than or equal to 60"),
        ({"every_s": 10**9}, "less than or equal to"),
        ({"every_s": 3600, "time_zone": "Europe/Berlin"}, "time_zone goes with cron"),
        ({"every_s": 3600, "missed": "twice"}, "'once' or 'skip'"),
        ({"every_s": 3600, "name": ""}, "name"),
        ({"every_s": 3600, "job": {**JOB, "recipes": ["int3"]}}, "Unknown recipe 'int3'"),
        ({"every_s": 3600, "hub_token": "hf_secret"}, "hub_token"),
    ],
)
def test_what_cannot_work_is_refused(fields: dict[str, Any], words: str) -> None:
    assert words in refusal(**fields)


@pytest.mark.parametrize(
    "zone", ["europe/berlin", "Europe/Berln", "../../etc/passwd", "/etc/localtime", "EUROPE/BERLIN"]
)
def test_a_zone_that_is_none_is_refused_and_the_nearest_is_named(zone: str) -> None:
    with pytest.raises(UnknownName) as caught:
        request(cron="0 3 * * *", time_zone=zone)
    if "erl" in zone.lower():
        assert "Did you mean 'Europe/Berlin'?" in caught.value.message
