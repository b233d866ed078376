"""Parts of resumable uploads in the ledger: of all that claim a place one gets it, in either database."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import func, select

from service.errors import Conflict, NotFound
from service.ledger import access, resumable
from service.ledger.blobs import OutputFile
from service.ledger.database import Database
from service.ledger.resumable import Announcement
from service.ledger.tables import UploadPart

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
