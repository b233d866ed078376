"""What a schedule asks for, and when its ticks are. Pure.

A tick is an instant at which a schedule submits its job: by a cron expression on the clock of a time zone, or by an
interval. When clocks are put forward or back, cronsim does as Debian's cron does; docs/decisions/0015-schedules.md says
what that means. Called by `service.api` and `service.commands` (requests) and by `service.ledger.schedules` (ticks).
"""

from __future__ import annotations

import datetime as dt
import difflib
import functools
import itertools
import zoneinfo
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cronsim import CronSim, CronSimError
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from service.errors import InvalidRequest, UnknownName
from service.requests import PLAIN, JobRequest

_CRON_FIELDS = 5
#: Expressions are tried out from here: what never comes within fifty years of any day never comes.
_SOME_DAY = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
_MIN_EVERY_S = 60
_MAX_EVERY_S = 366 * 24 * 3600


class ScheduleRequest(BaseModel):
    """A job, and when to submit it again."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(
        min_length=1,
        max_length=100,
        pattern=PLAIN,
        description="What you call it; no two of a tenant's are the same.",
    )
    cron: str | None = Field(
        default=None,
        max_length=200,
        description="Minute, hour, day of month, month, day of week; either this or `every_s`.",
        examples=["0 3 * * *"],
    )
    time_zone: str = Field(default="UTC", max_length=64, description="IANA name of the zone whose clock `cron` reads.")
    every_s: int | None = Field(
        default=None, ge=_MIN_EVERY_S, le=_MAX_EVERY_S, description="Seconds from tick to tick, the first one hence."
    )
    missed: Literal["once", "skip"] = Field(
        default="once",
        description="Ticks that passed while no worker ran: `once` submits one job for all of them, `skip` none.",
    )
    overlap: Literal["skip", "allow"] = Field(
        default="skip", description="A tick while the last job has not ended: `skip` leaves it out, `allow` submits."
    )
    job: JobRequest

    @field_validator("time_zone")
    @classmethod
    def _zone(cls, value: str) -> str:
        return _require_zone(value)

    @model_validator(mode="after")
    def _one_timing(self) -> ScheduleRequest:
        if (self.cron is None) == (self.every_s is None):
            raise ValueError("give either cron or every_s")
        if self.cron is None and self.time_zone != "UTC":
            raise ValueError("time_zone goes with cron; an interval is the same in every zone")
        if self.cron is not None:
            _require_cron(self.cron, self.time_zone)
        return self


@dataclass(frozen=True)
class Timing:
    """When the ticks of a schedule are."""

    cron: str | None
    time_zone: str
    every_s: int | None
    #: When the schedule was made; intervals count from here.
    anchor: dt.datetime

    def next_after(self, instant: dt.datetime) -> dt.datetime:
        """Return the first tick after an instant, in UTC; raises `InvalidRequest` if there is none in fifty years."""
        if self.every_s is not None:
            anchor = self.anchor.astimezone(dt.UTC).replace(microsecond=0)
            passed = (instant - anchor) // dt.timedelta(seconds=self.every_s)
            return anchor + dt.timedelta(seconds=self.every_s) * max(passed + 1, 1)
        assert self.cron is not None
        for tick in CronSim(self.cron, instant.astimezone(zoneinfo.ZoneInfo(self.time_zone))):
            # Instants of one zone compare by what its clock shows, which is wrong in the hour that comes twice: from
            # within its second round, the first round's ticks lie ahead on the clock and behind in time.
            if (in_utc := tick.astimezone(dt.UTC)) > instant:
                return in_utc
        raise InvalidRequest(f"The cron expression {self.cron!r} names no instant of the next fifty years.")

    def ticks_after(self, instant: dt.datetime) -> Iterator[dt.datetime]:
        """Yield the ticks after an instant, without end."""
        while True:
            instant = self.next_after(instant)
            yield instant


def read_ticks(timing: Timing, first: dt.datetime, count: int) -> list[dt.datetime]:
    """Return `count` ticks, beginning with the one at `first`."""
    return [first, *itertools.islice(timing.ticks_after(first), count - 1)]


def _require_cron(expression: str, time_zone: str) -> None:
    """Raise `ValueError` for what is no cron expression of five fields, or one that no day fits."""
    if len(expression.split()) != _CRON_FIELDS:
        raise ValueError(
            f"cron {expression!r} must have five fields: minute, hour, day of month, month, day of week; "
            "e.g. '0 3 * * *' for every day at 3:00"
        )
    try:
        Timing(expression, time_zone, None, _SOME_DAY).next_after(_SOME_DAY)
    except CronSimError as error:
        raise ValueError(f"cron {expression!r}: {str(error).lower()}") from error
    except InvalidRequest as error:
        raise ValueError(error.message) from error


@functools.cache
def _zones() -> frozenset[str]:
    return frozenset(zoneinfo.available_timezones())


def _require_zone(name: str) -> str:
    if name in _zones():
        return name
    by_lower = {zone.lower(): zone for zone in _zones()}
    nearest = difflib.get_close_matches(name.lower().replace(" ", "_"), by_lower, n=1, cutoff=0.4)
    hint = f" Did you mean {by_lower[nearest[0]]!r}?" if nearest else ""
    raise UnknownName(
        f"Unknown time zone {name!r}.{hint} Zones have IANA names such as Europe/Berlin, or UTC.",
        kind="time zone",
        name=name,
        nearest=by_lower[nearest[0]] if nearest else None,
    )
