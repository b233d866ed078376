"""`edgekiln schedules`: jobs that are submitted again by themselves."""

from __future__ import annotations

import datetime as dt
import zoneinfo
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from service.commands import options
from service.commands.jobs import name_source
from service.commands.output import format_error, format_time, print_json, print_table, say
from service.units import format_span, parse_span

SCHEDULES_EPILOG = """Examples:

\b
  edgekiln schedules add HuggingFaceTB/SmolLM-135M --cron "0 3 * * *" --time-zone Europe/Berlin
  edgekiln schedules list
  edgekiln schedules pause sch_1f0c9a2b3c4d5e6f
"""
ADD_EPILOG = """Examples:

\b
  edgekiln schedules add HuggingFaceTB/SmolLM-135M --cron "0 3 * * *" --time-zone Europe/Berlin
  edgekiln schedules add OWNER/NAME --every 6h --missed skip --recipe dynamic_int8 --gate max_kl=0.01
  edgekiln schedules add /srv/models/mine --name mine --cron "30 6 * * MON-FRI" --overlap allow
"""
LIST_EPILOG = """Example:

\b
  edgekiln schedules list --json | jq -r '.[] | select(.state == "active") | .id'
"""
SHOW_EPILOG = """Example:

\b
  edgekiln schedules show sch_1f0c9a2b3c4d5e6f
"""
PAUSE_EPILOG = """Example:

\b
  edgekiln schedules pause sch_1f0c9a2b3c4d5e6f
"""
RESUME_EPILOG = """Example:

\b
  edgekiln schedules resume sch_1f0c9a2b3c4d5e6f
"""
REMOVE_EPILOG = """Example:

\b
  edgekiln schedules remove sch_1f0c9a2b3c4d5e6f
"""

ScheduleId = Annotated[
    str, typer.Argument(metavar="ID", help="A schedule's id, as `edgekiln schedules list` shows it.")
]

schedules = typer.Typer(
    help="Submit jobs again by themselves: by a cron expression, or at intervals.",
    no_args_is_help=True,
    epilog=SCHEDULES_EPILOG,
)


@schedules.command("add", epilog=ADD_EPILOG)
@options.takes_order
def add(
    order: options.Order,
    cron: Annotated[
        str | None,
        typer.Option("--cron", metavar="EXPR", help="Minute, hour, day of month, month, day of week: '0 3 * * *'."),
    ] = None,
    time_zone: Annotated[
        str, typer.Option("--time-zone", metavar="ZONE", help="Whose clock --cron reads, e.g. Europe/Berlin.")
    ] = "UTC",
    every: Annotated[
        str | None, typer.Option("--every", metavar="SPAN", help="In place of --cron: 30m, 6h, 1d, 2w.")
    ] = None,
    missed: Annotated[
        str,
        typer.Option(
            "--missed", metavar="POLICY", help="Of ticks while no worker ran: once, for all one job; or skip."
        ),
    ] = "once",
    overlap: Annotated[
        str,
        typer.Option(
            "--overlap", metavar="POLICY", help="While the last job has not ended: skip the tick, or allow it."
        ),
    ] = "skip",
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="What you call it. [default: the source's name]")
    ] = None,
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Submit a job at every tick from now on.

    Takes the options of `submit`; the job is checked now as if it were submitted.
    """
    every_s = None if every is None else parse_span(every)
    with options.connect(url, api_key) as client:
        order.upload_files(client)
        schedule = client.add_schedule(
            name or order.request.source.label,
            order.request,
            cron=cron,
            time_zone=time_zone,
            every_s=every_s,
            missed=missed,
            overlap=overlap,
        )
    if as_json:
        print_json(schedule)
        return
    print(schedule["id"])
    say(f"First: {_format_tick(schedule, schedule['next_ticks'][0])}.")


@schedules.command("list", epilog=LIST_EPILOG)
def list_schedules(as_json: options.AsJson = False, url: options.Url = None, api_key: options.ApiKey = None) -> None:
    """List schedules, newest first."""
    with options.connect(url, api_key) as client:
        found = list(client.schedules(page_size=200))
    if as_json:
        print_json(found)
        return
    rows = [
        [
            schedule["id"],
            schedule["name"],
            _format_timing(schedule),
            schedule["state"],
            format_time(next(iter(schedule["next_ticks"]), None)),
            (schedule["last_tick"] or {}).get("outcome", "-"),
        ]
        for schedule in found
    ]
    print_table(("id", "name", "when", "state", "next", "last"), rows)


@schedules.command("show", epilog=SHOW_EPILOG)
def show(
    schedule_id: ScheduleId,
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Show a schedule.

    Its next ticks, and what became of the last ones.
    """
    with options.connect(url, api_key) as client:
        schedule = client.get_schedule(schedule_id)
    if as_json:
        print_json(schedule)
        return
    print(f"{schedule['name']}: {name_source(schedule['job'])}, {_format_timing(schedule)}, {schedule['state']}")
    print(f"missed ticks: {schedule['missed']}   while a job runs: {schedule['overlap']}")
    for tick in schedule["next_ticks"]:
        print(f"next: {_format_tick(schedule, tick)}")
    rows = [
        [
            _format_tick(schedule, tick["tick_at"]),
            tick["outcome"],
            format_error(tick["error"]) if tick["error"] else tick["job_id"] or "-",
        ]
        for tick in schedule["ticks"]
    ]
    if rows:
        print_table(("tick", "what became of it", "job"), rows)


@schedules.command("pause", epilog=PAUSE_EPILOG)
def pause(schedule_id: ScheduleId, url: options.Url = None, api_key: options.ApiKey = None) -> None:
    """Submit nothing until it is resumed; its jobs go on."""
    with options.connect(url, api_key) as client:
        say(f"Schedule {schedule_id}: {client.pause_schedule(schedule_id)['state']}.")


@schedules.command("resume", epilog=RESUME_EPILOG)
def resume(schedule_id: ScheduleId, url: options.Url = None, api_key: options.ApiKey = None) -> None:
    """Go on with the next tick from now; those of the pause are not made up for."""
    with options.connect(url, api_key) as client:
        schedule = client.resume_schedule(schedule_id)
    say(f"Schedule {schedule_id}: {schedule['state']}. Next: {_format_tick(schedule, schedule['next_ticks'][0])}.")


@schedules.command("remove", epilog=REMOVE_EPILOG)
def remove(schedule_id: ScheduleId, url: options.Url = None, api_key: options.ApiKey = None) -> None:
    """Forget a schedule; its jobs stay."""
    with options.connect(url, api_key) as client:
        client.remove_schedule(schedule_id)
    say(f"Schedule {schedule_id} is removed.")


def _format_timing(schedule: Mapping[str, Any]) -> str:
    if schedule["every_s"] is not None:
        return f"every {format_span(schedule['every_s'])}"
    return f"{schedule['cron']} ({schedule['time_zone']})"


def _format_tick(schedule: Mapping[str, Any], instant: str) -> str:
    """Return an instant by the clock that the schedule goes by; by this machine's for an interval."""
    zone = None if schedule["cron"] is None else zoneinfo.ZoneInfo(schedule["time_zone"])
    return dt.datetime.fromisoformat(instant).astimezone(zone).strftime("%Y-%m-%d %H:%M %Z")
