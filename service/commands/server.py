"""Commands of whoever runs a server: up, migrate."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands import options
from service.commands.interrupts import orderly_end
from service.commands.output import say
from service.errors import InvalidRequest, ServiceUnavailable

if TYPE_CHECKING:
    from service.ledger.database import Database

UP_EPILOG = """Examples:

\b
  edgekiln up
  edgekiln up --source-root ~/models --port 0
  edgekiln up --host 0.0.0.0 --allow-host kiln.example    (then make keys: edgekiln keys create NAME)
"""
_LOOK_S = 1.0


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
    with closing(database.Database(settings.ledger_url)) as ledger:
        yield ledger
