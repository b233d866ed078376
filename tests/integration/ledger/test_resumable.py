"""Parts of resumable uploads in the ledger: of all that claim a place one gets it, in either database."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import func, select, text, update

from service.errors import Conflict, NotFound, QuotaExceeded
from service.ledger import access, quotas, resumable
from service.ledger.blobs import OutputFile
from service.ledger.clock import now
from service.ledger.database import Database, Transaction
from service.ledger.resumable import Announcement
from service.ledger.tables import ResumableUpload, UploadPart
from service.ledger.uploads import enter_upload
from tests.kiln import wait_for

TENANT = "team"
RIVALS = 8


@pytest.fixture
def upload_id(database: Database) -> str:
    access.ensure_tenant(database, TENANT)
    return resumable.begin_upload(database, TENANT, Announcement(100, "model", None), 3600)


def part(number: int, size_bytes: int = 10) -> OutputFile:
    return OutputFile("part", f"{number:064x}", size_bytes)


def test_of_all_that_send_the_same_piece_one_goes_on(database: Database, upload_id: str) -> None:
    together = threading.Barrier(RIVALS, timeout=30)

    def send(number: int) -> bool:
        together.wait()
        try:
            resumable.add_part(database, TENANT, upload_id, 0, part(number), 3600)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(RIVALS) as pool:
        assert list(pool.map(send, range(RIVALS))).count(True) == 1
    assert resumable.read_resumable(database, TENANT, upload_id)["offset_bytes"] == 10
    count = database.read(lambda connection: connection.execute(select(func.count()).select_from(UploadPart)).scalar())
    assert count == 1


@pytest.mark.parametrize(("offset_bytes", "size_bytes"), [(5, 10), (0, 101), (20, 10)])
def test_a_piece_that_does_not_fit_is_refused(
    database: Database, upload_id: str, offset_bytes: int, size_bytes: int
) -> None:
    with pytest.raises(Conflict):
        resumable.add_part(database, TENANT, upload_id, offset_bytes, part(1, size_bytes), 3600)
    resumable.add_part(database, TENANT, upload_id, 0, part(1, 100), 3600)


def test_the_whole_is_made_by_one_at_a_time(database: Database, upload_id: str) -> None:
    assert not resumable.claim_assembly(database, TENANT, upload_id, 60), "not all of it is there"
    resumable.add_part(database, TENANT, upload_id, 0, part(1, 100), 3600)
    assert resumable.claim_assembly(database, TENANT, upload_id, 60)
    assert not resumable.claim_assembly(database, TENANT, upload_id, 60)
    resumable.hold_assembly(database, upload_id, 0)
    assert resumable.claim_assembly(database, TENANT, upload_id, 60)
    resumable.finish_assembly(database, TENANT, upload_id, part(1, 100))
    assert not resumable.claim_assembly(database, TENANT, upload_id, 60)
    assert resumable.read_resumable(database, TENANT, upload_id)["state"] == "stored"
    assert resumable.read_parts(database, upload_id) == []


def test_of_two_that_make_the_whole_the_first_counts(database: Database, upload_id: str) -> None:
    resumable.add_part(database, TENANT, upload_id, 0, part(1, 100), 3600)
    resumable.finish_assembly(database, TENANT, upload_id, part(1, 100))
    stored = resumable.read_resumable(database, TENANT, upload_id)
    # The parts were gone when the second one read them.
    resumable.finish_assembly(database, TENANT, upload_id, part(2, 0))
    resumable.fail_assembly(database, upload_id, {"code": "blob_corrupt"})
    assert resumable.read_resumable(database, TENANT, upload_id) == stored


def test_what_was_given_up_becomes_nothing(database: Database, upload_id: str) -> None:
    resumable.add_part(database, TENANT, upload_id, 0, part(1, 100), 3600)
    resumable.remove_resumable(database, TENANT, upload_id)
    with pytest.raises(NotFound):
        resumable.finish_assembly(database, TENANT, upload_id, part(1, 100))


# --- room ---------------------------------------------------------------------------------------


def used_bytes(database: Database) -> int:
    (found,) = [each for each in quotas.list_tenants(database) if each["id"] == TENANT]
    return int(found["quotas"]["stored_bytes"]["used"])


def test_a_file_counts_as_announced_until_it_is_stored(database: Database, upload_id: str) -> None:
    """Its parts may all be alike, or be what the tenant has anyway: they count nothing of their own."""
    enter_upload(database, TENANT, part(1, 10), None)
    assert used_bytes(database) == 110
    for offset_bytes in range(0, 100, 10):
        resumable.add_part(database, TENANT, upload_id, offset_bytes, part(1), 3600)
        assert used_bytes(database) == 110
    resumable.finish_assembly(database, TENANT, upload_id, part(2, 100))
    assert used_bytes(database) == 110
    again = resumable.begin_upload(database, TENANT, Announcement(100, "model", None), 3600)
    assert used_bytes(database) == 210
    resumable.add_part(database, TENANT, again, 0, part(3, 100), 3600)
    resumable.finish_assembly(database, TENANT, again, part(2, 100))
    assert used_bytes(database) == 110, "each content once"


@pytest.mark.parametrize("end", ["removed", "failed", "expired"])
def test_what_becomes_nothing_counts_no_more(database: Database, upload_id: str, end: str) -> None:
    resumable.add_part(database, TENANT, upload_id, 0, part(1), 3600)
    assert used_bytes(database) == 100, "control"
    if end == "removed":
        resumable.remove_resumable(database, TENANT, upload_id)
    elif end == "failed":
        resumable.fail_assembly(database, upload_id, {"code": "blob_corrupt"})
    else:
        expire(database, upload_id)
    assert used_bytes(database) == 0


def expire(database: Database, upload_id: str) -> None:
    is_it = ResumableUpload.id == upload_id
    database.write(lambda tx: tx.connection.execute(update(ResumableUpload).where(is_it).values(expires_at=now(-1))))


def test_whatever_asks_for_room_sees_what_is_announced(database: Database, upload_id: str) -> None:
    quotas.set_quotas(database, TENANT, {"stored_bytes": 101})
    quotas.require_room_for_upload(database, TENANT)
    database.write(lambda tx: quotas.require_room_for_job(tx, TENANT))
    resumable.begin_upload(database, TENANT, Announcement(1, None, None), 3600)
    with pytest.raises(QuotaExceeded):
        quotas.require_room_for_upload(database, TENANT)
    with pytest.raises(QuotaExceeded):
        database.write(lambda tx: quotas.require_room_for_job(tx, TENANT))
    with pytest.raises(QuotaExceeded):
        resumable.begin_upload(database, TENANT, Announcement(1, None, None), 3600)


# --- races --------------------------------------------------------------------------------------


@pytest.fixture
def pg_upload(postgres_database: Database) -> str:
    access.ensure_tenant(postgres_database, TENANT)
    return resumable.begin_upload(postgres_database, TENANT, Announcement(100, None, None), 3600)


def await_lock(database: Database) -> None:
    """Wait until another session waits for a lock of this one."""
    waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted AND pid <> pg_backend_pid()")
    wait_for(lambda: database.ask(lambda connection: connection.execute(waiting).scalar_one()) or None, "it waits")


@pytest.mark.parametrize("ahead", ["part", "delete"])
def test_a_part_that_races_a_delete_is_gone_with_its_upload(
    postgres_database: Database, pg_upload: str, ahead: str
) -> None:
    database = postgres_database

    def add(tx: Transaction) -> None:
        resumable.add_part.__wrapped__(tx, TENANT, pg_upload, 0, part(1), 3600)  # type: ignore[attr-defined]

    def remove(tx: Transaction) -> None:
        resumable.remove_resumable.__wrapped__(tx, TENANT, pg_upload)  # type: ignore[attr-defined]

    first, second = (add, remove) if ahead == "part" else (remove, add)
    with ThreadPoolExecutor(1) as pool:

        def hold(tx: Transaction) -> Any:
            first(tx)
            later = pool.submit(database.write, second)
            await_lock(database)
            return later

        later = database.write(hold)
        if ahead == "part":
            later.result(30)
        else:
            with pytest.raises(NotFound):
                later.result(30)
    with pytest.raises(NotFound):
        resumable.read_resumable(database, TENANT, pg_upload)
    assert resumable.read_parts(database, pg_upload) == []


def test_an_upload_that_goes_on_as_it_expires_is_kept_whole(postgres_database: Database, pg_upload: str) -> None:
    """The part came in time; the sweep, which saw an upload that nobody goes on with, leaves it alone."""
    database = postgres_database

    resumable.add_part(database, TENANT, pg_upload, 0, part(1), 3600)
    with ThreadPoolExecutor(1) as pool:

        def renew(tx: Transaction) -> Any:
            # As a part that took its row in time does.
            tx.connection.execute(update(ResumableUpload).values(expires_at=now(3600)))
            return pool.submit(resumable.drop_expired, database).result(30)

        expire(database, pg_upload)
        assert database.write(renew) == 0
    assert resumable.read_resumable(database, TENANT, pg_upload)["state"] == "receiving"
    expire(database, pg_upload)
    assert resumable.drop_expired(database) == 1, "control"
