"""`edgekiln workers`: the fleet, and draining; for operators."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands import options
from service.commands.output import print_json, print_table, say
from service.units import format_bytes

if TYPE_CHECKING:
    from service.client import Client

WORKERS_EPILOG = """Examples:

\b
  edgekiln workers
  edgekiln workers --json | jq -r '.[] | select(.state == "silent") | .host'
  edgekiln workers drain worker_1f0c9a2b3c4d5e6f --wait
  edgekiln workers resume worker_1f0c9a2b3c4d5e6f
"""
#: Between two looks at a worker that is waited for.
_LOOK_S = 1.0

WorkerId = Annotated[str, typer.Argument(metavar="ID", help="A worker's id, as `edgekiln workers` lists it.")]

workers = typer.Typer(
    help="Show the fleet, drain its workers. Needs an operator's key, where keys are needed.", epilog=WORKERS_EPILOG
)


@workers.callback(invoke_without_command=True)
def list_workers(
    context: typer.Context,
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Show the fleet: hosts, slots, memory, disk, and what each worker is running.

    Needs an operator's key, where keys are needed.
    """
    if context.invoked_subcommand is not None:
        return
    with options.connect(url, api_key) as client:
        found = client.workers()
    if as_json:
        print_json(found)
        return
    columns = ("worker", "state", "slots\nin use", "memory\npredicted", "disk\nfree", "running")
    print_table(columns, [_row(worker) for worker in found])


def _row(worker: Mapping[str, Any]) -> list[str]:
    slots = [f"{name} {slot['busy']}/{slot['total']}" for name, slot in worker["slots"].items() if slot["total"]]
    running = [f"{step['kind']} of {step['tenant']}" for step in worker["running"]]
    return [
        f"{worker['id']}\n{worker['host']}\n{worker['cores']} cores, tools {worker['toolchain_id'][:8]}",
        f"{worker['state']}\n{_format_age(worker['heartbeat_age_s'])}",
        "\n".join(slots) or "-",
        f"{format_bytes(worker['memory_predicted_bytes'])}\nof {format_bytes(worker['memory_bytes'])}",
        f"{format_bytes(worker['disk_free_bytes'])}\nof {format_bytes(worker['disk_bytes'])}",
        "\n".join(running) or "-",
    ]


def _format_age(age_s: float) -> str:
    """Return how long ago something was heard of, in the unit that fits."""
    for unit, length_s in (("h", 3600.0), ("min", 60.0)):
        if age_s >= length_s:
            return f"{age_s / length_s:.0f} {unit} ago"
    return f"{age_s:.0f} s ago"


@workers.command("drain")
def drain_worker(
    worker_id: WorkerId,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until it runs nothing more.")] = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Let a worker claim nothing new and finish what it runs."""
    with options.connect(url, api_key) as client:
        running = client.drain_worker(worker_id)["running"]
        say(f"Worker {worker_id} claims nothing more; it runs {len(running)} step{'' if len(running) == 1 else 's'}.")
        if wait and running:
            _wait_until_idle(client, worker_id)
            say(f"Worker {worker_id} runs nothing; it can be stopped.")


def _wait_until_idle(client: Client, worker_id: str) -> None:
    while any(worker["id"] == worker_id and worker["running"] for worker in client.workers()):
        time.sleep(_LOOK_S)


@workers.command("resume")
def resume_worker(worker_id: WorkerId, url: options.Url = None, api_key: options.ApiKey = None) -> None:
    """Let a drained worker claim again."""
    with options.connect(url, api_key) as client:
        client.resume_worker(worker_id)
    say(f"Worker {worker_id} claims again.")
