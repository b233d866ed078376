"""Backup and restore of ledger and object store together, from and into either profile.

Owns the order of moves, what a backup's folder holds, and its checks. `docs/decisions/0019-backup.md` says why it is
consistent beside running workers. Called by `edgekiln backup` and `edgekiln restore`.

    backup.json    written last: without it the folder is no backup
    ledger.jsonl   every row of one snapshot
    objects/       blobs and manifests, as a folder store has them
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from alembic.util import CommandError

from service.errors import BackupIncomplete, BackupInvalid, BlobCorrupt, BlobMissing, InvalidRequest, NotEmpty
from service.ledger import copy, sweep
from service.ledger.database import Database, migrate
from service.storage import ObjectStore, blob_digest, blob_key, digest_bytes, digest_file, manifest_key, open_store

_FORMAT = 1
_HEAD, _LEDGER, _OBJECTS, _PARTIAL = "backup.json", "ledger.jsonl", "objects", "partial"
#: What `ObjectStore.check` leaves for a moment.
_PROBES = "probes/"
#: Objects on their way at once: what a store's distance costs is waiting.
_TRANSFERS = 8

T = TypeVar("T")
Document = dict[str, Any]
#: Told now and then: what is done, how many objects of how many.
Report = Callable[[str, int, int], None]


def back_up(database: Database, store: ObjectStore, folder: Path, report: Report) -> Document:
    """Write a backup into a folder that is empty or not there; safe beside running workers. Return `backup.json`.

    Raises `NotEmpty`; `BackupIncomplete`, when all but what the store has lost is written; `StoreUnavailable`.
    """
    if folder.exists() and any(folder.iterdir()):
        raise NotEmpty(f"{folder} is not empty. Name a folder that is not there yet.", folder=str(folder))
    (folder / _PARTIAL).mkdir(parents=True)
    folder.chmod(0o700)
    objects = _open_objects(folder)
    # 1. the bulk, while the ledger goes on
    digests = [row.digest for row in sweep.read_stored(database) if not row.is_condemned]
    _for_each(digests, partial(_copy_blob, store, objects, folder / _PARTIAL), "copied", report)
    # 2. the ledger, in one snapshot
    head = _write_ledger(database, folder)
    # 3. what the snapshot names and the bulk lacks: no byte of it is swept before hours have passed
    faults: dict[str, str] = {}
    done = _for_each(_read_needed(folder), partial(_copy_blob, store, objects, folder / _PARTIAL), "checked", report)
    faults.update((digest, fault) for digest, fault in done if fault)
    faults.update(_copy_manifests(folder, objects))
    (folder / _PARTIAL).rmdir()
    head |= {"objects": _add_up(objects), "faults": faults}
    _write_head(folder, head)
    if faults:
        raise BackupIncomplete(
            f"{len(faults)} objects that the ledger counts on are missing or damaged in the store. {folder} holds "
            "everything else and can be restored; its backup.json names them under `faults`.",
            folder=str(folder),
            faults=faults,
        )
    return head


def check_backup(folder: Path, report: Report) -> Document:
    """Read a backup through and return `backup.json`; raises `BackupInvalid`."""
    head = _read_head(folder)
    digest, _ = digest_file(folder / _LEDGER)
    if digest != head["ledger"]["sha256"]:
        raise BackupInvalid(f"{folder / _LEDGER} is damaged. Use another backup.", path=str(folder / _LEDGER))
    objects = _open_objects(folder)
    held = {found.key for found in objects.list()}
    needed = {blob_key(digest) for digest in _read_needed(folder) if digest not in head["faults"]}
    checked = _for_each(sorted(held), partial(_check_object, folder), "checked", report)
    broken = sorted({*(needed - held), *(key for key, is_whole in checked if not is_whole)})
    if broken:
        raise BackupInvalid(
            f"{folder} lacks {len(broken)} objects or has them damaged, {broken[0]} first. Use another backup.",
            objects=broken,
        )
    return head


def restore(
    database: Database, store: ObjectStore, folder: Path, report: Report, *, keep_objects: bool = False
) -> Document:
    """Bring a backup into an empty ledger and store, objects first; return `backup.json`.

    An interrupted restore may be repeated. `keep_objects` lets the store hold others too: the sweep removes them.
    Raises `NotEmpty`, `BackupInvalid`, `StoreUnavailable`.
    """
    head = check_backup(folder, report)
    revision = head["ledger"]["revision"]
    _require_empty_ledger(database, revision)
    objects = _open_objects(folder)
    if not keep_objects:
        _require_only(store, {found.key for found in objects.list()})
    _for_each([found.key for found in objects.list()], partial(_put_object, store, folder), "restored", report)
    # Rows never precede their blobs.
    try:
        migrate(database.url, revision)
    except CommandError as error:
        raise BackupInvalid(
            f"The backup's ledger has the schema {revision!r}, which this version does not know. Restore it with the "
            "version that made it, then upgrade.",
            revision=revision,
        ) from error
    copy.load_rows(database, folder / _LEDGER)
    migrate(database.url)
    return head


# --- the ledger -----------------------------------------------------------------------------------


def _write_ledger(database: Database, folder: Path) -> Document:
    path = folder / _LEDGER
    with path.open("x", encoding="utf-8") as stream:
        revision, counts = copy.write_rows(database, stream)
        stream.flush()
        os.fsync(stream.fileno())
    digest, size_bytes = digest_file(path)
    ledger = {"sha256": digest, "size_bytes": size_bytes, "revision": revision, "rows": counts}
    return {"format": _FORMAT, "created_at": datetime.now(UTC).isoformat(), "ledger": ledger}


def _read_needed(folder: Path) -> Iterator[str]:
    """Yield the digests of the blobs that a written ledger counts on; nothing refers to a condemned one."""
    for row in copy.read_rows(folder / _LEDGER, "blobs"):
        if row["condemned_at"] is None:
            yield row["digest"]


def _copy_manifests(folder: Path, objects: ObjectStore) -> dict[str, str]:
    """Write the manifests of what is published, which the ledger holds too; return those that are damaged."""
    faults = {}
    for row in copy.read_rows(folder / _LEDGER, "publications"):
        manifest, digest = row["manifest"].encode(), row["manifest_digest"]
        if row["published_at"] is None:
            continue
        if digest_bytes(manifest) == digest:
            objects.put_bytes(manifest_key(digest), manifest)
        else:
            faults[digest] = BlobCorrupt.code
    return faults


def _require_empty_ledger(database: Database, revision: str) -> None:
    if not copy.is_empty(database):
        raise NotEmpty(
            "The ledger holds rows already. Stop every process of this installation and name an empty database, or "
            "another --data-dir."
        )
    if copy.read_revision(database) not in ("", revision):
        raise NotEmpty("The ledger has tables of another version than the backup's. Name a database without tables.")


# --- objects --------------------------------------------------------------------------------------


def _open_objects(folder: Path) -> ObjectStore:
    return open_store((folder / _OBJECTS).absolute().as_uri())


def _copy_blob(store: ObjectStore, objects: ObjectStore, partial_dir: Path, digest: str) -> str | None:
    """Copy a blob that the backup lacks; return what is wrong with it, if anything is."""
    key = blob_key(digest)
    try:
        objects.stat(key)
    except BlobMissing:
        path = partial_dir / digest
        try:
            store.get_file(key, path, digest)
            objects.put_file(key, path, digest, is_final=True)
        except (BlobMissing, BlobCorrupt) as error:
            return error.code
        finally:
            path.unlink(missing_ok=True)
    return None


def _check_object(folder: Path, key: str) -> bool:
    return digest_file(folder / _OBJECTS / key)[0] == _digest_of(key)


def _put_object(store: ObjectStore, folder: Path, key: str) -> None:
    store.put_file(key, folder / _OBJECTS / key, _digest_of(key))


def _digest_of(key: str) -> str:
    """Return the digest that an object's key states."""
    return blob_digest(key) or key.rpartition("/")[2].removesuffix(".json")


def _require_only(store: ObjectStore, keys: set[str]) -> None:
    strange = next((found.key for found in store.list() if found.key not in keys and not _is_probe(found.key)), None)
    if strange is not None:
        raise NotEmpty(
            f"The store holds objects that are not of this backup, {strange} first. Name an empty store, or keep them "
            "with --keep-objects: nothing is overwritten, and the sweep removes what no row names.",
            key=strange,
        )


def _is_probe(key: str) -> bool:
    return key.startswith(_PROBES)


def _add_up(objects: ObjectStore) -> Document:
    sizes = [found.size_bytes for found in objects.list()]
    return {"count": len(sizes), "size_bytes": sum(sizes)}


def _for_each(keys: Iterable[str], act: Callable[[str], T], what: str, report: Report) -> list[tuple[str, T]]:
    """Do the same for many objects, several at once; the first failure ends it."""
    wanted = list(keys)
    lock = threading.Lock()
    done = 0

    def run(key: str) -> tuple[str, T]:
        nonlocal done
        result = act(key)
        with lock:
            done += 1
            report(what, done, len(wanted))
        return key, result

    with ThreadPoolExecutor(_TRANSFERS, thread_name_prefix="backup") as pool:
        try:
            return list(pool.map(run, wanted))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# --- the head -------------------------------------------------------------------------------------


def _write_head(folder: Path, head: Document) -> None:
    partial_path = folder / f"{_HEAD}.part"
    with partial_path.open("x", encoding="utf-8") as stream:
        json.dump(head, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    partial_path.replace(folder / _HEAD)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_head(folder: Path) -> Document:
    try:
        head: Document = json.loads((folder / _HEAD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidRequest(f"{folder} is no finished backup: it has no {_HEAD}.", folder=str(folder)) from None
    except ValueError as error:
        raise BackupInvalid(f"{folder / _HEAD} is damaged: {error}. Use another backup.") from error
    if head.get("format") != _FORMAT:
        raise BackupInvalid(f"{folder} has format {head.get('format')!r}; this version reads format {_FORMAT}.")
    return head
