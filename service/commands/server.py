"""Commands of whoever runs a server: up, migrate, keys."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands import options
from service.commands.interrupts import orderly_end
from service.commands.output import format_time, print_json, print_table, say
from service.errors import InvalidRequest, ServiceUnavailable

if TYPE_CHECKING:
    from service.ledger.database import Database

UP_EPILOG = """Examples:

\b
  edgekiln up
  edgekiln up --source-root ~/models --port 0
  edgekiln up --host 0.0.0.0 --allow-host kiln.example    (then make keys: edgekiln keys create NAME)
"""
KEYS_EPILOG = """Examples:

\b
  edgekiln keys create laptop --expires-days 90
  edgekiln keys list
  edgekiln keys revoke key_1f0c9a2b3c4d5e6f
"""
_DAY_S = 24 * 3600.0
_LOOK_S = 1.0

Tenant = Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whose work the key gives access to.")]

keys = typer.Typer(help="Make, list and end API keys.", no_args_is_help=True, epilog=KEYS_EPILOG)


def up(
    data_dir: options.DataDir = None,
    host: Annotated[
        str | None, typer.Option("--host", metavar="H", help="Address to listen on; other than loopback needs keys.")
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", metavar="P", min=0, max=65535, help="Port; 0 takes a free one.")
    ] = None,
    source_root: Annotated[
        list[Path] | None,
        typer.Option("--source-root", metavar="DIR", help="Jobs may name folders below DIR; may be repeated."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="NAME", help="Answer to this Host name too; may be repeated."),
    ] = None,
) -> None:
    """Serve until Ctrl-C: API, worker and beat.

    A part that dies is started again and reported. Everything is kept in the data directory.
    """
    from service.supervisor import Supervisor

    settings = options.read_settings(
        data_dir=data_dir,
        host=host,
        port=port,
        source_roots=_existing(source_root) or None,
        allowed_hosts=tuple(allow_host) if allow_host else None,
    )
    supervisor = Supervisor(settings, report=say)
    try:
        with orderly_end():
            with supervisor:
                roots = os.pathsep.join(str(root) for root in settings.source_roots) or "none (--source-root DIR)"
                say(f"EdgeKiln serves {supervisor.url}")
                say(f"  data: {settings.data_dir}   logs: {settings.data_dir / 'logs'}   folders: {roots}")
                say("Ctrl-C stops it.")
                while supervisor.is_running:
                    threading.Event().wait(_LOOK_S)
                raise ServiceUnavailable("The supervisor has ended; see above.")
    except KeyboardInterrupt:
        say("Stopped.")
        raise typer.Exit(0) from None


def _existing(roots: list[Path] | None) -> tuple[Path, ...]:
    for root in roots or ():
        if not root.expanduser().is_dir():
            raise InvalidRequest(f"--source-root {root}: there is no such folder.")
    return tuple(roots or ())


def migrate(data_dir: options.DataDir = None) -> None:
    """Bring the database to the newest schema.

    `edgekiln up` does it by itself.
    """
    from service.ledger import database

    settings = options.read_settings(data_dir=data_dir)
    database.migrate(settings.ledger_url)
    say("The ledger has the newest schema.")


@contextmanager
def open_ledger(data_dir: Path | None) -> Iterator[Database]:
    """Open the ledger of a data directory, or the one that is configured."""
    from service.ledger import database

    settings = options.read_settings(data_dir=data_dir)
    database.migrate(settings.ledger_url)
    ledger = database.Database(settings.ledger_url)
    try:
        yield ledger
    finally:
        ledger.close()


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the key is for.")],
    tenant: Tenant = "default",
    expires_days: Annotated[
        float | None, typer.Option("--expires-days", metavar="N", help="Valid for so long; for ever if not given.")
    ] = None,
    operator: Annotated[
        bool, typer.Option("--operator", help="The key may also see and drain workers, with all tenants' work on them.")
    ] = False,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Make an API key and print it, this once."""
    from service.ledger import access

    if expires_days is not None and expires_days <= 0:
        raise InvalidRequest("--expires-days must be more than 0.")
    with open_ledger(data_dir) as ledger:
        access.ensure_tenant(ledger, tenant)
        lifetime_s = None if expires_days is None else expires_days * _DAY_S
        key = access.create_key(ledger, tenant, name, lifetime_s, is_operator=operator)
    if as_json:
        facts = {"tenant": tenant, "name": name, "is_operator": operator}
        print_json({"id": key.id, "prefix": key.prefix, "key": key.secret, **facts})
        return
    say(f"Key {key.id} for tenant {tenant}. It is shown only now:")
    print(key.secret)


@keys.command("list")
def list_keys(tenant: Tenant = "default", data_dir: options.DataDir = None, as_json: options.AsJson = False) -> None:
    """List a tenant's keys, without their secrets."""
    from service.ledger import access

    with open_ledger(data_dir) as ledger:
        found = access.list_keys(ledger, tenant)
    if as_json:
        print_json(found)
        return
    instants = ("created", "expires", "revoked")
    rows = [
        [
            key["id"],
            key["name"],
            key["prefix"],
            "yes" if key["is_operator"] else "no",
            *(format_time(key[f"{what}_at"]) for what in instants),
        ]
        for key in found
    ]
    print_table(("id", "name", "prefix", "operator", *instants), rows)


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, as `edgekiln keys list` shows it.")],
    tenant: Tenant = "default",
    data_dir: options.DataDir = None,
) -> None:
    """End a key at once."""
    from service.ledger import access

    with open_ledger(data_dir) as ledger:
        access.revoke_key(ledger, tenant, key_id)
    say(f"Key {key_id} is revoked.")
