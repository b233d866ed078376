"""`edgekiln tenants`: who uses the service, how much, and how much each may; for whoever holds the ledger."""

from __future__ import annotations

from typing import Annotated

import typer

from service.commands import options
from service.commands.output import print_json, print_table, say
from service.commands.server import open_ledger
from service.errors import InvalidRequest
from service.units import format_bytes, parse_bytes

TENANTS_EPILOG = """Examples:

\b
  edgekiln tenants
  edgekiln tenants limit team --running-steps 8 --unfinished-jobs 500 --stored 200GB
  edgekiln tenants limit team --stored none
"""
_NO_LIMIT = "none"

tenants = typer.Typer(help="Show tenants and what they use; limit it.", epilog=TENANTS_EPILOG)


@tenants.callback(invoke_without_command=True)
def list_tenants(context: typer.Context, data_dir: options.DataDir = None, as_json: options.AsJson = False) -> None:
    """Show tenants, what each uses, and its limits."""
    from service.ledger import quotas

    if context.invoked_subcommand is not None:
        return
    with open_ledger(data_dir) as ledger:
        found = quotas.list_tenants(ledger)
    if as_json:
        print_json(found)
        return
    columns = tuple(text.replace(" ", "\n") for text in quotas.QUOTAS.values())
    rows = [[each["id"], *(_format_quota(name, **each["quotas"][name]) for name in quotas.QUOTAS)] for each in found]
    print_table(("tenant", *columns), rows, right=columns)


def _format_quota(name: str, used: int, limit: int | None) -> str:
    texts = [format_bytes(each) if name == "stored_bytes" else str(each) for each in (used, limit) if each is not None]
    return " of ".join(texts)


@tenants.command("limit")
def limit_tenant(
    tenant: Annotated[str, typer.Argument(metavar="NAME", help="A tenant, as `edgekiln tenants` lists it.")],
    running_steps: Annotated[
        str | None, typer.Option("--running-steps", metavar="N", help="Most steps that run at once; `none`: no limit.")
    ] = None,
    unfinished_jobs: Annotated[
        str | None, typer.Option("--unfinished-jobs", metavar="N", help="Most jobs that have not ended, or `none`.")
    ] = None,
    stored: Annotated[
        str | None,
        typer.Option("--stored", metavar="SIZE", help="Most bytes in the store, e.g. 200GB, or `none`."),
    ] = None,
    schedules: Annotated[
        str | None, typer.Option("--schedules", metavar="N", help="Most schedules, or `none`.")
    ] = None,
    data_dir: options.DataDir = None,
) -> None:
    """Set a tenant's quotas; those not named stay as they are."""
    from service.ledger import quotas

    limits = {
        "running_steps": _read_count("--running-steps", running_steps),
        "unfinished_jobs": _read_count("--unfinished-jobs", unfinished_jobs),
        "stored_bytes": None if stored in (None, _NO_LIMIT) else parse_bytes(str(stored)),
        "schedules": _read_count("--schedules", schedules),
    }
    given = {
        "running_steps": running_steps,
        "unfinished_jobs": unfinished_jobs,
        "stored_bytes": stored,
        "schedules": schedules,
    }
    named = {name: limit for name, limit in limits.items() if given[name] is not None}
    if not named:
        raise InvalidRequest("Name a quota: --running-steps, --unfinished-jobs, --stored or --schedules.")
    with open_ledger(data_dir) as ledger:
        quotas.set_quotas(ledger, tenant, named)
    say(f"Tenant {tenant}: " + ", ".join(f"{quotas.QUOTAS[name]}: {given[name]}" for name in named) + ".")


def _read_count(option: str, text: str | None) -> int | None:
    if text is None or text == _NO_LIMIT:
        return None
    if not (text.isascii() and text.isdigit()):
        raise InvalidRequest(f"{option} {text}: give a number from 0, or `none` for no limit.")
    return int(text)
