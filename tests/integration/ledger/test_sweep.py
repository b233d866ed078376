"""The sweep beside jobs, uploads and crashes: what goes, what stays, and that nothing needed is ever lost."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from service.errors import BlobCondemned, UploadNotFound
from service.ledger import blobs, locks, results, schedules, sweep, uploads
from service.ledger.base import Base
from service.ledger.blobs import OutputFile, commit_uploaded, reprieve_blobs
from service.ledger.database import Database, Transaction
from service.ledger.tables import Blob, Publication, Step, StepOutput
from service.schedules import ScheduleRequest
from service.storage import blob_key
from service.storage.folder import FolderStore
from service.sweep import Finding, sweep_store
from tests.api_world import StoredPlay
from tests.ledger_play import TENANT

LONG_S = 3600.0
#: How long a transaction waits inside for a rival that is locked out and does not come.
_LOCKED_OUT_S = 1.0


class Store(FolderStore):
    """A folder in which a test may act just before or after a deletion."""

    before_delete: Callable[[], None] = staticmethod(lambda: None)
    after_delete: Callable[[], None] = staticmethod(lambda: None)

    def delete(self, key: str) -> None:
        self.before_delete()
        super().delete(key)
        self.after_delete()


class Bench:
    """A ledger, a store, a worker, and the sweep."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.store = Store(folder / "store")
        self.play = StoredPlay(database, self.store)

    def sweep(self, keep_s: float = 0.0, wait_s: float = 0.0, dry_run: bool = False) -> list[Finding]:
        retention = sweep.Retention(keep_s, keep_s, math.inf, math.inf, wait_s)
        return list(sweep_store(self.database, self.store, retention, dry_run=dry_run))

    def digests(self, fate: str, **options: Any) -> set[str]:
        return {finding.digest for finding in self.sweep(**options) if finding.fate == fate}

    def finish_job(self, **fields: Any) -> str:
        job_id = self.play.submit(**fields)
        self.play.run_all()
        assert self.play.job(job_id)["state"] == "succeeded"
        return job_id

    def stored(self) -> set[str]:
        return {found.key.rpartition("/")[2] for found in self.store.list("blobs/")}

    def outputs(self, *kinds: str) -> set[str]:
        statement = select(StepOutput.digest).join(Step, Step.id == StepOutput.step_id).where(Step.kind.in_(kinds))
        return self.read(statement)

    def read(self, statement: Any) -> set[Any]:
        return self.database.read(lambda connection: set(connection.execute(statement).scalars()))

    def put(self, data: bytes) -> OutputFile:
        return self.play.put("file", data)

    def commit(self, file: OutputFile, reprieves: blobs.Reprieves | None = None) -> None:
        """Commit a blob with something that refers to it, as every commit does."""
        uploads.enter_upload(self.database, TENANT, file, None, reprieves)

    def lose(self, digest: str) -> bool:
        """Whether the ledger counts on bytes that are gone."""
        return sweep.is_kept(self.database, digest) and digest not in self.stored()


@pytest.fixture
def bench(database: Database, tmp_path: Path) -> Bench:
    return Bench(database, tmp_path)


# --- what goes, and what stays ------------------------------------------------------------------


def test_what_is_kept_for_reuse_alone_goes_and_what_was_published_stays(bench: Bench) -> None:
    job_id = bench.finish_job()
    before = bench.stored()
    published = bench.read(select(Publication.digest))
    intermediate = bench.outputs("fetch", "convert", "quantize", "bundle") - published
    assert published
    assert bench.sweep(keep_s=LONG_S) == [], "used a moment ago"
    assert bench.digests("condemned") == intermediate
    assert bench.stored() == before, "condemned is not deleted"
    assert bench.digests("deleted", wait_s=LONG_S) == set(), "nor before the wait is over"
    assert bench.digests("deleted") == intermediate
    assert bench.stored() == before - intermediate
    assert bench.sweep() == [], "nothing is left to do"
    for variant in bench.play.job(job_id)["variants"]:
        assert {artifact["sha256"] for artifact in variant["artifacts"]} <= bench.stored()


def test_a_job_whose_intermediates_have_gone_is_made_again(bench: Bench) -> None:
    bench.finish_job()
    bench.sweep()
    bench.sweep()
    gone = bench.outputs("convert")
    assert not gone & bench.stored()
    job_id = bench.play.submit()
    assert "convert" in bench.play.run_all()
    assert bench.play.job(job_id)["state"] == "succeeded"
    assert gone <= bench.stored(), "the same bytes are there again"
    assert bench.sweep(keep_s=LONG_S) == []
    bench.play.submit()
    assert "convert" not in bench.play.run_all(), "control: what was not swept is reused"


def test_a_live_job_keeps_what_it_links_to(bench: Bench) -> None:
    bench.finish_job(recipes=["none"])
    job_id = bench.play.submit(recipes=["none", "float16"])
    claim = bench.play.claim_kind("quantize")
    assert bench.sweep() == []
    bench.play.finish(claim)
    bench.play.run_all()
    assert bench.play.job(job_id)["state"] == "succeeded"
    assert bench.outputs("convert") <= bench.digests("condemned"), "control: now nobody does"


def test_outputs_of_a_retired_step_stay_while_a_live_job_needs_them(bench: Bench) -> None:
    job_id = bench.play.submit()
    claim = bench.play.claim_kind("convert")
    bench.play.finish(claim)
    results.retire_step(bench.database, claim.step_id)
    assert bench.sweep() == []
    bench.play.run_all()
    assert bench.play.job(job_id)["state"] == "succeeded"
    assert bench.outputs("convert") <= bench.digests("condemned", keep_s=LONG_S)


def test_uploads_stay_while_a_job_names_them(bench: Bench) -> None:
    named, unnamed = bench.put(b"named"), bench.put(b"unnamed")
    for file in (named, unnamed):
        bench.commit(file)
    bench.finish_job(evaluation=named.digest)
    assert unnamed.digest not in bench.digests("condemned", keep_s=LONG_S)
    bench.sweep()
    bench.sweep()
    assert named.digest in bench.stored()
    assert unnamed.digest not in bench.stored()
    with pytest.raises(UploadNotFound):
        bench.play.submit(evaluation=unnamed.digest)
    bench.play.submit(evaluation=named.digest)


def test_uploads_stay_while_a_schedule_names_them(bench: Bench) -> None:
    file = bench.put(b"named")
    bench.commit(file)
    job = {"source": {"kind": "folder", "path": "/models/tiny"}, "evaluation": file.digest}
    request = ScheduleRequest.model_validate({"name": "nightly", "every_s": 3600, "job": job})
    schedule_id = schedules.add_schedule(bench.database, TENANT, request, max_variants=256)
    assert bench.sweep() == []
    schedules.remove_schedule(bench.database, TENANT, schedule_id)
    assert bench.digests("condemned") == {file.digest}, "control: now nobody does"


def test_objects_without_a_row_go_once_they_are_old(bench: Bench) -> None:
    stray = bench.put(b"its upload was not committed").digest
    others = ["blobs/00/notes", f"blobs/00/{'1' * 64}", f"blobs/{'0' * 64}", f"manifests/{'0' * 64}.json"]
    for key in others:
        bench.store.put_bytes(key, b"not a blob of ours")
    assert bench.sweep(wait_s=LONG_S) == []
    assert bench.digests("condemned") == {stray}
    assert bench.digests("deleted") == {stray}
    assert sorted(found.key for found in bench.store.list()) == sorted(others)


def test_rows_without_an_object_are_reported_and_left(bench: Bench) -> None:
    bench.finish_job()
    (digest,) = bench.outputs("convert")
    bench.store.delete(blob_key(digest))
    assert bench.digests("missing", keep_s=LONG_S) == {digest}
    assert bench.digests("missing", keep_s=LONG_S) == {digest}
    assert sweep.is_kept(bench.database, digest)


def test_a_dry_run_says_what_would_go_and_changes_nothing(bench: Bench) -> None:
    bench.finish_job()
    bench.sweep()
    bench.finish_job(path="/models/other", recipes=["float16"])
    bench.put(b"stray")
    bench.commit(bench.put(b"an upload that no job names"))
    before = everything(bench.database), list(bench.store.list())
    promised = bench.sweep(dry_run=True)
    assert (everything(bench.database), list(bench.store.list())) == before
    assert {finding.fate for finding in promised} == {"deleted", "condemned"}
    assert sorted(map(str, promised)) == sorted(map(str, bench.sweep()))


def everything(database: Database) -> dict[str, list[Any]]:
    tables = Base.metadata.sorted_tables
    return database.read(
        lambda connection: {table.name: sorted(map(str, connection.execute(select(table)))) for table in tables}
    )


# --- crashes ------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process is gone."""


def crash() -> None:
    raise Crash


@pytest.mark.parametrize("seam", ["before_delete", "after_delete"])
def test_a_crash_in_the_midst_of_a_deletion_is_made_good(bench: Bench, seam: str) -> None:
    condemned = bench.put(b"condemned").digest
    bench.sweep()
    setattr(bench.store, seam, crash)
    with pytest.raises(Crash):
        bench.sweep()
    assert not bench.lose(condemned)
    setattr(bench.store, seam, lambda: None)
    assert bench.digests("deleted") == {condemned}
    assert bench.stored() == set()


def test_a_reprieve_whose_holder_dies_is_swept_after_another_wait(bench: Bench) -> None:
    file = bench.put(b"condemned")
    bench.sweep()
    assert set(reprieve_blobs(bench.database, [file.digest])) == {file.digest}
    assert bench.sweep(wait_s=LONG_S) == []
    assert bench.digests("deleted") == {file.digest}


# --- commits that race with the sweep -----------------------------------------------------------


def test_a_commit_of_what_is_condemned_is_refused_until_it_was_uploaded_again(bench: Bench) -> None:
    file = bench.put(b"condemned")
    bench.sweep()
    with pytest.raises(BlobCondemned):
        bench.commit(file)
    again: list[str] = []
    commit_uploaded(bench.database, lambda tokens: bench.commit(file, tokens), again.extend)
    assert again == [file.digest]
    assert bench.sweep(keep_s=LONG_S) == [], "it is an upload like any other"
    assert file.digest in bench.stored()


def commit_after_the_deletion(bench: Bench) -> OutputFile:
    """A worker finds its output in the store and skips the upload; it commits after the sweep has been there."""
    stray = b"made again by a worker"
    file = bench.put(stray)
    bench.sweep()
    assert bench.store.put_bytes(blob_key(file.digest), stray) is False, "it is there: nothing was sent"
    bench.sweep()
    commit_uploaded(bench.database, lambda tokens: bench.commit(file, tokens), lambda _: bench.put(stray) and None)
    return file


def test_a_commit_after_the_deletion_loses_nothing(bench: Bench) -> None:
    assert not bench.lose(commit_after_the_deletion(bench).digest)


def test_control_without_the_condemned_check_the_blob_is_lost(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def enter(tx: Transaction, files: list[OutputFile], _tokens: object) -> None:
        for file in files:
            tx.connection.execute(
                update(Blob).where(Blob.digest == file.digest).values(condemned_at=None, swept_at=None)
            )

    monkeypatch.setattr(uploads, "commit_blobs", enter)
    assert bench.lose(commit_after_the_deletion(bench).digest)


def test_a_token_is_worth_nothing_once_another_has_a_newer_one(bench: Bench) -> None:
    file = bench.put(b"condemned")
    bench.sweep()
    old = dict(reprieve_blobs(bench.database, [file.digest]))
    (newer,) = wait_for_another_stamp(bench, file.digest, old)
    with pytest.raises(BlobCondemned):
        bench.commit(file, old)
    bench.commit(file, {file.digest: newer})
    bench.commit(file)


def wait_for_another_stamp(bench: Bench, digest: str, old: dict[str, Any]) -> list[Any]:
    """Reprieve again until the clock has moved on."""
    while (new := reprieve_blobs(bench.database, [digest])) == old:
        continue
    return list(new.values())


def test_a_token_is_worth_nothing_once_the_bytes_are_gone(bench: Bench) -> None:
    file = bench.put(b"condemned")
    bench.sweep()
    tokens = reprieve_blobs(bench.database, [file.digest])
    bench.sweep()
    with pytest.raises(BlobCondemned):
        bench.commit(file, tokens)


def commit_during_the_deletion(bench: Bench) -> str:
    """A rival commits while the sweep, having looked, is about to delete; return the digest."""
    data = b"wanted by a rival"
    file = bench.put(data)
    bench.sweep()

    def rival() -> None:
        commit_uploaded(bench.database, lambda tokens: bench.commit(file, tokens), lambda _: bench.put(data) and None)

    with ThreadPoolExecutor(1) as pool:
        done = threading.Event()

        def come() -> None:
            if not done.is_set():
                future = pool.submit(rival)
                future.add_done_callback(lambda _: done.set())
                done.wait(_LOCKED_OUT_S)

        bench.store.before_delete = come
        with contextlib.suppress(IntegrityError):
            bench.sweep()
    return file.digest


def test_a_commit_during_the_deletion_waits_and_loses_nothing(bench: Bench) -> None:
    digest = commit_during_the_deletion(bench)
    assert sweep.is_kept(bench.database, digest)
    assert not bench.lose(digest)


def test_control_without_the_rows_lock_the_blob_is_lost(
    postgres_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(postgres_database, tmp_path)
    monkeypatch.setattr(locks, "lock_blobs", lambda *_: None)
    assert bench.lose(commit_during_the_deletion(bench))


def test_the_sweep_waits_for_a_commit_in_progress(bench: Bench) -> None:
    file = bench.put(b"being committed")
    bench.sweep()
    tokens = reprieve_blobs(bench.database, [file.digest])
    swept = threading.Event()

    def commit(tx: Transaction) -> None:
        uploads.enter_upload.__wrapped__(tx, TENANT, file, None, tokens)  # type: ignore[attr-defined]
        pool.submit(bench.sweep, keep_s=LONG_S).add_done_callback(lambda _: swept.set())
        assert not swept.wait(_LOCKED_OUT_S), "the sweep did not wait"

    with ThreadPoolExecutor(1) as pool:
        bench.database.write(commit)
    assert swept.is_set()
    assert not bench.lose(file.digest)
    assert file.digest in bench.stored()


def join_while_retired(bench: Bench, play_sweep: Callable[[], object]) -> str:
    """A plan joins the steps of an earlier job in the instant in which they are retired."""
    bench.finish_job()
    job_id = bench.play.submit()
    plan = bench.play.claim_kind("plan")
    with ThreadPoolExecutor(2) as pool:
        finished = pool.submit(bench.play.finish, plan)
        swept = pool.submit(play_sweep)
        finished.result()
        swept.result()
    return job_id


def test_a_job_that_joins_what_is_being_retired_loses_nothing(bench: Bench) -> None:
    job_id = join_while_retired(bench, bench.sweep)
    bench.sweep()
    bench.play.run_all()
    assert bench.play.job(job_id)["state"] == "succeeded"
    kept = select(Blob.digest).where(Blob.condemned_at.is_(None))
    assert bench.read(kept) <= bench.stored()
    wanted = select(StepOutput.digest).join(Step, Step.id == StepOutput.step_id).where(Step.retired_at.is_(None))
    assert bench.read(wanted) <= bench.stored()


def test_a_step_retired_while_a_plan_waits_for_its_lock_is_not_joined(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan has read the steps, and the sweep commits before it holds their locks."""
    bench.finish_job()
    job_id = bench.play.submit()
    plan = bench.play.claim_kind("plan")
    lock_steps = locks.lock_steps
    retired = []

    def retire_first(tx: Transaction, step_ids: Any) -> None:
        if not retired and list(step_ids) and tx.is_postgresql:
            retired.append(True)
            with ThreadPoolExecutor(1) as pool:
                pool.submit(sweep.retire_unused_steps, bench.database, 0.0).result()
        lock_steps(tx, step_ids)

    monkeypatch.setattr("service.ledger.graph.locks.lock_steps", retire_first)
    bench.play.finish(plan)
    monkeypatch.undo()
    reused = {step["kind"] for step in bench.play.job(job_id)["steps"] if step["reused"]}
    assert ("convert" in reused) != bool(retired)
