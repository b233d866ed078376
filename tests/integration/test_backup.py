"""Backup and restore: from either profile into either, beside running work, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from service import backup
from service.errors import BackupIncomplete, BackupInvalid, InvalidRequest, LeaseLost, NotEmpty, StoreUnavailable
from service.ledger import access, copy
from service.ledger.base import Base
from service.ledger.clock import now
from service.ledger.database import Database, migrate
from service.ledger.tables import Attempt, Blob, Job, Publication, Step, StepOutput
from service.storage import ObjectStore, blob_key, digest_bytes, manifest_key, read_object
from service.storage.folder import FolderStore
from tests.api_world import StoredPlay
from tests.ledger_play import EXPIRED
from tests.services import s3_store

#: What no restore may change, but for the claims of steps that were under way.
_TABLES = [table for table in Base.metadata.sorted_tables if table.name not in ("steps", "attempts")]


def silent(_what: str, _done: int, _total: int) -> None:
    """Report nothing."""


@dataclass
class World:
    """A ledger, a store, and whoever plays the workers."""

    database: Database
    store: ObjectStore

    @property
    def play(self) -> StoredPlay:
        return StoredPlay(self.database, self.store)

    def rows(self) -> dict[str, list[str]]:
        """Return what every table but the steps' holds; the order of a document's fields means nothing."""
        return self.database.read(
            lambda connection: {
                table.name: sorted(
                    json.dumps([*row], sort_keys=True, default=str) for row in connection.execute(select(table))
                )
                for table in _TABLES
            }
        )

    def blobs(self) -> dict[str, int]:
        """Return blobs' keys and sizes."""
        return {found.key: found.size_bytes for found in self.store.list("blobs/")}

    def manifests(self) -> dict[str, str]:
        """Return what stands under the manifests' keys; the players of workers leave it to the ledger."""
        keys = (found.key for found in self.store.list("manifests/"))
        return {key: read_object(self.store, key, key[10:-5]).decode() for key in keys}

    def back_up(self, folder: Path) -> dict[str, Any]:
        return backup.back_up(self.database, self.store, folder, silent)

    def restore(self, folder: Path, **options: Any) -> dict[str, Any]:
        return backup.restore(self.database, self.store, folder, silent, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SQLite and a folder, with a job that has ended, and one whose conversion was claimed by a worker that is gone."""
    folder = tmp_path_factory.mktemp("made")
    url = f"sqlite:///{folder / 'ledger.db'}"
    migrate(url)
    world = World(Database(url), FolderStore(folder / "store"))
    world.play.submit()
    world.play.run_all()
    world.play.submit("/models/other")
    world.play.claim_kind("convert", EXPIRED)
    world.database.close()
    return folder


@pytest.fixture
def laptop(made: Path, tmp_path: Path) -> Iterator[World]:
    """A copy of it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    world = World(Database(f"sqlite:///{tmp_path / 'ledger.db'}"), FolderStore(tmp_path / "store"))
    yield world
    world.database.close()


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[World]:
    """SQLite and a folder, where nothing is yet, not even a table."""
    world = World(Database(f"sqlite:///{tmp_path / 'again.db'}"), FolderStore(tmp_path / "store-again"))
    yield world
    world.database.close()


def finish_all(world: World) -> set[str]:
    """Let a new worker do what is left; return the jobs' states."""
    world.play.run_all()
    return set(world.database.read(lambda connection: connection.execute(select(Job.state)).scalars().all()))


def test_from_a_laptop_to_postgresql_and_s3_and_back(
    laptop: World, empty: World, postgres_ledger_url: str, tmp_path: Path
) -> None:
    head = laptop.back_up(tmp_path / "one")
    database = Database(postgres_ledger_url)
    with s3_store(tmp_path / "s3") as store:
        server = World(database, store)
        server.restore(tmp_path / "one")
        assert server.rows() == laptop.rows()
        assert server.blobs() == laptop.blobs()

        assert server.back_up(tmp_path / "two")["ledger"]["rows"] == head["ledger"]["rows"]
        empty.restore(tmp_path / "two")
        assert finish_all(server) == {"succeeded"}
    database.close()
    assert finish_all(empty) == {"succeeded"}


def test_a_restored_ledger_serves_and_goes_on(laptop: World, empty: World, tmp_path: Path) -> None:
    key = access.create_key(laptop.database, "default", "laptop")
    laptop.back_up(tmp_path / "backup")
    empty.restore(tmp_path / "backup")

    assert access.authenticate(empty.database, key.secret).tenant_id == "default"
    for digest in empty.database.read(lambda tx: tx.execute(select(Publication.digest)).scalars().all()):
        with empty.store.open(blob_key(digest)) as chunks:
            assert digest_bytes(b"".join(chunks)) == digest
    recorded = select(Publication.manifest_digest, Publication.manifest)
    published = empty.database.read(lambda tx: tx.execute(recorded).all())
    assert empty.manifests() == {manifest_key(digest): manifest for digest, manifest in published}
    # Only what was under way is left, and its first attempt is called lost.
    assert finish_all(empty) == {"succeeded"}
    attempts = empty.database.read(
        lambda tx: (
            tx.execute(select(Attempt.state).join(Step, Step.id == Attempt.step_id).where(Step.kind == "convert"))
            .scalars()
            .all()
        )
    )
    assert sorted(attempts) == ["lost", "succeeded", "succeeded"]


def test_a_worker_of_the_lost_ledger_cannot_write_into_the_restored_one(
    laptop: World, empty: World, tmp_path: Path
) -> None:
    laptop.back_up(tmp_path / "backup")
    # After the backup the step passes on to another worker, whose token the backup has never seen.
    zombie = laptop.play.claim_kind("convert", EXPIRED)
    empty.restore(tmp_path / "backup")
    heir = empty.play.claim_kind("convert")
    assert heir.step_id == zombie.step_id
    with pytest.raises(LeaseLost):
        StoredPlay(empty.database, empty.store).finish(zombie)
    empty.play.finish(heir)


def test_without_the_leap_of_tokens_it_could(
    laptop: World, empty: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control."""
    monkeypatch.setattr("service.ledger.copy._TOKEN_LEAP", 0)
    laptop.back_up(tmp_path / "backup")
    zombie = laptop.play.claim_kind("convert", EXPIRED)
    empty.restore(tmp_path / "backup")
    empty.play.claim_kind("convert")
    StoredPlay(empty.database, empty.store).finish(zombie)


class BusyStore(FolderStore):
    """A store beside which workers go on: they finish everything while the first object is being copied."""

    play: StoredPlay | None = None

    def get_file(self, key: str, path: Path, sha256: str, *, is_read_only: bool = False) -> int:
        if self.play is not None:
            play, self.play = self.play, None
            play.run_all()
        return super().get_file(key, path, sha256, is_read_only=is_read_only)


def test_a_backup_beside_running_workers_is_of_one_moment(laptop: World, empty: World, tmp_path: Path) -> None:
    store = BusyStore(tmp_path / "store")
    count = len(laptop.blobs())
    store.play = laptop.play
    backup.back_up(laptop.database, store, tmp_path / "backup", silent)
    assert len(laptop.blobs()) > count
    empty.restore(tmp_path / "backup")
    assert empty.rows() == laptop.rows()
    assert empty.blobs() == laptop.blobs()


def test_what_the_sweep_has_condemned_is_left_out_and_can_come_back(
    laptop: World, empty: World, tmp_path: Path
) -> None:
    digest = digest_bytes(b"nobody needs this")
    laptop.store.put_bytes(blob_key(digest), b"nobody needs this")
    condemned = {"digest": digest, "size_bytes": 17, "created_at": now(), "condemned_at": now()}
    laptop.database.write(lambda tx: tx.connection.execute(tx.insert(Blob).values(**condemned)))
    head = laptop.back_up(tmp_path / "backup")
    assert head["faults"] == {}
    empty.restore(tmp_path / "backup")
    assert blob_key(digest) not in empty.blobs()
    assert digest in empty.database.read(lambda tx: tx.execute(select(Blob.digest)).scalars().all())


def test_a_store_that_lost_something_is_backed_up_and_said_to_be(laptop: World, empty: World, tmp_path: Path) -> None:
    gone, damaged = laptop.database.read(lambda tx: tx.execute(select(StepOutput.digest).limit(2)).scalars().all())
    laptop.store.delete(blob_key(gone))
    (tmp_path / "store" / blob_key(damaged)).write_bytes(b"damaged")
    with pytest.raises(BackupIncomplete) as caught:
        laptop.back_up(tmp_path / "backup")
    assert caught.value.details["faults"] == {gone: "blob_missing", damaged: "blob_corrupt"}
    empty.restore(tmp_path / "backup")
    assert empty.rows() == laptop.rows()


@pytest.mark.parametrize("fault", ["flip", "cut", "remove", "ledger", "head"])
def test_a_damaged_backup_is_refused_before_anything_is_written(
    laptop: World, empty: World, tmp_path: Path, fault: str
) -> None:
    folder = tmp_path / "backup"
    laptop.back_up(folder)
    assert backup.check_backup(folder, silent)["objects"]["count"] > 0
    path = next(path for path in sorted((folder / "objects" / "blobs").rglob("*")) if path.is_file())
    if fault == "flip":
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    elif fault == "cut":
        os.truncate(path, 10)
    elif fault == "remove":
        path.unlink()
    elif fault == "ledger":
        with (folder / "ledger.jsonl").open("a") as ledger:
            ledger.write("\n")
    else:
        (folder / "backup.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(BackupInvalid):
        empty.restore(folder)
    assert empty.blobs() == {}
    assert copy.read_revision(empty.database) == ""


def test_an_unfinished_backup_is_none(laptop: World, empty: World, tmp_path: Path) -> None:
    laptop.back_up(tmp_path / "backup")
    (tmp_path / "backup" / "backup.json").unlink()
    with pytest.raises(InvalidRequest, match="no finished backup"):
        empty.restore(tmp_path / "backup")


def test_nothing_is_overwritten(laptop: World, empty: World, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    laptop.back_up(folder)
    with pytest.raises(NotEmpty, match="is not empty"):
        laptop.back_up(folder)
    with pytest.raises(NotEmpty, match="ledger holds rows"):
        laptop.restore(folder)

    stranger = blob_key(digest_bytes(b"mine"))
    empty.store.put_bytes(stranger, b"mine")
    with pytest.raises(NotEmpty, match=stranger):
        empty.restore(folder)
    empty.restore(folder, keep_objects=True)
    assert empty.rows() == laptop.rows()
    assert stranger in empty.blobs()


class FailingStore(FolderStore):
    """A store that is away after some objects."""

    left = 3

    def put_file(self, key: str, path: Path, sha256: str, *, is_final: bool = False) -> bool:
        if self.left == 0:
            raise StoreUnavailable("The store is away.")
        self.left -= 1
        return super().put_file(key, path, sha256, is_final=is_final)


def test_an_interrupted_restore_may_be_repeated(laptop: World, empty: World, tmp_path: Path) -> None:
    laptop.back_up(tmp_path / "backup")
    failing = FailingStore(tmp_path / "store-again")
    with pytest.raises(StoreUnavailable):
        backup.restore(empty.database, failing, tmp_path / "backup", silent)
    assert 0 < len(empty.blobs()) < len(laptop.blobs())
    empty.restore(tmp_path / "backup")
    assert empty.rows() == laptop.rows()
    assert empty.blobs() == laptop.blobs()


def test_a_backup_of_an_older_version_is_brought_to_the_newest_schema(empty: World, tmp_path: Path) -> None:
    instant = "2026-01-31T12:00:00+00:00"
    lines: list[Any] = [
        {"table": "tenants", "columns": {"id": "plain", "created_at": "instant"}},
        ["t", instant],
        {"table": "hosts", "columns": {"id": "plain", "cores": "plain", "memory_bytes": "plain"}},
        ["h", 1, 1],
    ]
    folder = tmp_path / "backup"
    folder.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "ledger.jsonl").write_text(text)
    ledger = {"sha256": digest_bytes(text.encode()), "revision": "0001", "rows": {"tenants": 1, "hosts": 1}}
    (folder / "backup.json").write_text(json.dumps({"format": 1, "ledger": ledger, "faults": {}}))
    empty.restore(folder)
    with empty.database.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT id FROM tenants").scalars().all() == ["t"]
    # The newest tables are there.
    assert empty.rows()["uploads"] == []
