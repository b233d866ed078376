"""`edgekiln backup` and `edgekiln restore`: ledger and object store together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands import options
from service.commands.output import print_json, say
from service.commands.server import open_ledger
from service.data_dir import DataDirLock
from service.units import format_bytes

if TYPE_CHECKING:
    from service.settings import Settings

BACKUP_EPILOG = """Examples:

\b
  edgekiln backup /backups/$(date +%F)
  edgekiln backup --data-dir ~/kiln /backups/kiln --json
"""
RESTORE_EPILOG = """Examples:

\b
  edgekiln restore /backups/2026-01-31 --check
  edgekiln restore /backups/2026-01-31 --data-dir ~/kiln-again
  edgekiln restore /backups/2026-01-31 --keep-objects      (the ledger was lost, the store was not)
"""
#: Between two lines of progress.
_PAUSE_S = 2.0


def backup(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that is empty or not there yet.")],
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Copy ledger and object store into a folder, checked against their digests.

    Safe beside running workers: the copy is of one moment.
    """
    from service.backup import back_up
    from service.storage import open_configured_store

    with open_ledger(data_dir) as ledger:
        store = open_configured_store(options.read_settings(data_dir=data_dir))
        head = back_up(ledger, store, folder, _make_reporter())
    _finish(head, folder, "Backed up to", as_json)


def restore(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `edgekiln backup` wrote.")],
    check: Annotated[bool, typer.Option("--check", help="Only read the backup through; write nothing.")] = False,
    keep_objects: Annotated[
        bool, typer.Option("--keep-objects", help="The store may hold other objects; they are left alone.")
    ] = False,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Bring a backup into an empty ledger and object store, of either profile.

    Stop every process of the installation first. A restore that was interrupted may be repeated.
    """
    from service import backup as backups
    from service.ledger.database import Database
    from service.storage import open_configured_store

    if check:
        _finish(backups.check_backup(folder, _make_reporter()), folder, "Whole:", as_json)
        return
    settings = options.read_settings(data_dir=data_dir)
    with _reserve(settings), closing(Database(settings.ledger_url)) as ledger:
        store = open_configured_store(settings)
        head = backups.restore(ledger, store, folder, _make_reporter(), keep_objects=keep_objects)
    _finish(head, folder, "Restored from", as_json)


@contextmanager
def _reserve(settings: Settings) -> Iterator[None]:
    """Keep a data directory from being served meanwhile; raises `DataDirBusy`."""
    lock = DataDirLock(settings.data_dir)
    if not settings.database_url:
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make_reporter() -> Callable[[str, int, int], None]:
    """Return what says how far it is, now and then."""
    said_at = time.monotonic()

    def report(what: str, done: int, total: int) -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= _PAUSE_S:
            said_at = time.monotonic()
            say(f"{what} {done:,} of {total:,} objects")

    return report


def _finish(head: dict[str, Any], folder: Path, what: str, as_json: bool) -> None:
    if as_json:
        print_json({"folder": str(folder.absolute()), **head})
        return
    rows, objects = sum(head["ledger"]["rows"].values()), head["objects"]
    size = format_bytes(objects["size_bytes"])
    say(f"{what} {folder}: {rows:,} rows, {objects['count']:,} objects, {size}, of {head['created_at']}.")
