"""The runner between a real ledger, a store that may be away, and a child that is played."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select

from service.errors import LedgerBusy, SourceNotFound, StepCancelled, StoreUnavailable
from service.ledger import claims, jobs, results, uploads, views
from service.ledger.blobs import OutputFile
from service.ledger.clock import now
from service.ledger.database import Database, Transaction
from service.ledger.tables import Blob, Step
from service.settings import load_settings
from service.storage import blob_key, digest_bytes
from service.storage.folder import FolderStore
from tests.ledger_play import TENANT, TOOLCHAIN, Play
from workers import runner as runner_module
from workers import transfer
from workers.process import identify_host
from workers.runner import Runner
from workers.sandbox import ChildResult, Sandbox, StopReason

#: What a child does: gets the arguments of `Sandbox.run`, returns how it ended.
Act = Callable[..., ChildResult]


class PlayedSandbox(Sandbox):
    """Runs no process: `act` says how a child ends; its files are in the step's folder."""

    def __init__(self, act: Act) -> None:
        self._act = act

    def warm(self, pool: str) -> None:
        pass

    def run(self, target: str, params: Any, inputs: Any, step_dir: Path, **options: Any) -> ChildResult:
        (step_dir / "output").mkdir(parents=True)
        (step_dir / "log.txt").write_text("last words\n")
        return self._act(step_dir=step_dir, params=params, inputs=inputs, **options)


def ended(step_dir: Path, **how: Any) -> ChildResult:
    """Return the end of a child, by default the success of `resolve`."""
    usual: dict[str, Any] = {
        "figures": None if how.get("error") else {"source": {"kind": "folder", "path": "/models", "revision": "x"}},
        "error": None,
        "stopped": None,
        "output_dir": step_dir / "output",
        "log_path": step_dir / "log.txt",
        "peak_rss_bytes": 2,
        "peak_anon_bytes": 1,
        "duration_s": 1.0,
        "isolation": "strong",
        "isolation_reasons": (),
    }
    return ChildResult(**{**usual, **how})


class FlakyStore(FolderStore):
    """A folder that is away as long as `is_away` says so; it is asked before each upload."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.is_away: Callable[[], bool] = lambda: False

    def put_file(self, key: str, path: Path, sha256: str, *, is_final: bool = False) -> bool:
        if self.is_away():
            raise StoreUnavailable("The store does not answer.")
        return super().put_file(key, path, sha256, is_final=is_final)


class Bench:
    """A ledger with a submitted job, and runners on it."""

    def __init__(self, folder: Path, database: Database) -> None:
        self.folder = folder
        self.play = Play(database, host=identify_host())
        self.job_id = self.play.submit()
        self.store = FlakyStore(folder / "store")

    def make_runner(self, act: Act, **settings: Any) -> Runner:
        settings = {"data_dir": self.folder, "retry_pause_s": 0.0, **settings}
        return Runner(
            load_settings(settings),
            self.play.database,
            self.store,
            PlayedSandbox(act),
            self.play.worker_id,
            TOOLCHAIN,
            self.folder / "work",
        )

    def step(self, kind: str = "resolve") -> dict[str, Any]:
        return next(step for step in self.play.job(self.job_id)["steps"] if step["kind"] == kind)

    def logs(self) -> list[tuple[str, bool]]:
        """Return each attempt's state, and whether its log is stored."""
        found = views.list_logs(self.play.database, TENANT, self.job_id)
        return [(attempt["state"], attempt["log_digest"] is not None) for attempt in found]


@pytest.fixture
def bench(tmp_path: Path, sqlite_ledger_url: str) -> Iterator[Bench]:
    database = Database(sqlite_ledger_url)
    yield Bench(tmp_path, database)
    database.close()


def test_a_step_that_succeeds_is_recorded(bench: Bench) -> None:
    """Control: the played child is taken for a real one."""
    assert bench.make_runner(lambda step_dir, **_: ended(step_dir)).run_next("fetch")
    step = bench.step()
    assert step["state"] == "succeeded", step
    assert bench.logs() == [("succeeded", True)]
    assert not list((bench.folder / "work").iterdir())


@pytest.mark.parametrize("slots", [1, 2])
def test_a_class_without_a_free_slot_asks_the_ledger_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    """Most messages of a busy fleet find every slot taken; with a free one, the ledger is asked."""
    bench.play.submit(path="/models/other")
    asked = []
    claim_next = claims.claim_next

    def count(database: Database, worker_id: str, resource_class: str, policy: claims.LeasePolicy) -> Any:
        asked.append(resource_class)
        return claim_next(database, worker_id, resource_class, policy)

    monkeypatch.setattr(claims, "claim_next", count)

    def act(step_dir: Path, **_: Any) -> ChildResult:
        if len(asked) == 1:
            assert runner.run_next("fetch") == (slots == 2)
        return ended(step_dir)

    runner = bench.make_runner(act, fetch_slots=slots)
    assert runner.run_next("fetch")
    assert len(asked) == slots
    # What ran has ended, and its slot is free.
    assert runner.run_next("fetch")


def test_of_messages_that_came_together_one_finds_that_nothing_is_left(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(claims, "claim_next", lambda *_: asked.append(1))
    runner = bench.make_runner(lambda step_dir, **_: ended(step_dir))
    woken_at = time.monotonic()
    assert not runner.run_next("fetch")
    # One that had come before and waited for its turn, another class, and one that comes now.
    assert runner._claim("fetch", woken_at) is None
    assert len(asked) == 1
    assert runner._claim("light", woken_at) is None
    assert not runner.run_next("fetch")
    assert len(asked) == 3


def test_a_ledger_that_is_away_costs_a_message_and_no_more(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise LedgerBusy("The ledger does not answer.")

    with monkeypatch.context() as patch:
        patch.setattr(claims, "claim_next", refuse)
        assert not bench.make_runner(lambda step_dir, **_: ended(step_dir)).run_next("fetch")
    monkeypatch.setattr(claims, "due_classes", refuse)
    assert bench.make_runner(lambda step_dir, **_: ended(step_dir)).run_next("fetch")
    assert bench.step()["state"] == "succeeded"
    assert "claim a step" in caplog.text
    assert "wake others" in caplog.text


def test_the_measuring_host_chooses_its_threads(bench: Bench) -> None:
    bench.play.submit(devices=["host"])
    while (claim := bench.play.claim("fetch")) is not None:
        bench.play.finish(claim, outputs=[])
    figures = {"engines": {"auto": "reauthored"}, "prefill_lengths": [8], "context_length": 64}
    runner = bench.make_runner(lambda step_dir, **_: ended(step_dir, figures=figures), benchmark_processes=3)
    while runner.run_next("light"):
        pass
    statement = select(Step.params).where(Step.kind == "benchmark")
    found = bench.play.database.read(lambda connection: connection.execute(statement).scalars().all())
    assert [params["processes"] for params in found] == [3] * len(found) != []
    assert not [params for params in found if "threads" in params]


def make_two_outputs(step_dir: Path, **_: Any) -> ChildResult:
    for name in ("a", "b"):
        (step_dir / "output" / name).write_text(name)
    return ended(step_dir)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses between tries are short."""
    monkeypatch.setattr(transfer, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(runner_module, "_LEDGER_PAUSE_S", 0.001)


def test_a_shutdown_gives_the_step_back_though_the_store_is_away(bench: Bench) -> None:
    bench.store.is_away = lambda: True

    def act(step_dir: Path, **_: Any) -> ChildResult:
        return ended(step_dir, error=StepCancelled("The worker shuts down."), stopped=StopReason.SHUTDOWN)

    assert bench.make_runner(act, max_failures=1).run_next("fetch")
    assert (bench.step()["state"], bench.step()["error"]) == ("queued", None)
    assert bench.logs() == [("released", False)]


def test_an_error_is_told_though_its_log_cannot_be_stored(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.store.is_away = lambda: True
    error = SourceNotFound("There is no such folder.")
    assert bench.make_runner(lambda step_dir, **_: ended(step_dir, error=error)).run_next("fetch")
    assert (bench.step()["state"], bench.step()["error"]["code"]) == ("failed", "source_not_found")
    assert bench.logs() == [("failed", False)]
    assert "cannot store the log" in caplog.text


@pytest.mark.usefixtures("hasty")
def test_a_finished_step_waits_for_a_store_that_comes_back(bench: Bench) -> None:
    tries = iter([False, True, True, True])
    bench.store.is_away = lambda: next(tries, False)
    assert bench.make_runner(make_two_outputs, max_failures=1).run_next("fetch")
    assert bench.step()["state"] == "succeeded"
    assert bench.logs() == [("succeeded", True)]


@pytest.mark.usefixtures("hasty")
def test_a_store_that_stays_away_fails_the_step_in_the_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_PATIENCE_S", 0.05)
    bench.store.is_away = lambda: True
    assert bench.make_runner(make_two_outputs, max_failures=1).run_next("fetch")
    assert bench.step()["error"]["code"] == "store_unavailable"


@pytest.mark.usefixtures("hasty")
def test_waiting_for_the_store_ends_when_the_worker_shuts_down(bench: Bench) -> None:
    def shut_down() -> bool:
        runner.shut_down()
        return True

    bench.store.is_away = shut_down
    runner = bench.make_runner(make_two_outputs, max_failures=1)
    assert runner.run_next("fetch")
    assert bench.step()["state"] == "queued"
    assert bench.logs() == [("released", False)]


@pytest.mark.usefixtures("hasty")
def test_waiting_for_the_store_ends_when_the_job_is_cancelled(bench: Bench) -> None:
    def cancel() -> bool:
        if bench.play.job(bench.job_id)["state"] == "running":
            jobs.cancel_job(bench.play.database, TENANT, bench.job_id)
        return True

    bench.store.is_away = cancel
    assert bench.make_runner(make_two_outputs, cancel_poll_s=0.01).run_next("fetch")
    assert bench.step()["state"] == "cancelled"


def test_an_output_that_the_sweep_has_taken_is_uploaded_again(bench: Bench) -> None:
    digests = [digest_bytes(b"a"), digest_bytes(b"b")]

    def take_both(tx: Transaction) -> None:
        for digest, swept_at in zip(digests, (None, now()), strict=True):
            values = {"digest": digest, "size_bytes": 1, "created_at": now(), "condemned_at": now()}
            tx.connection.execute(insert(Blob).values(**values, swept_at=swept_at))

    bench.play.database.write(take_both)
    assert bench.make_runner(make_two_outputs, max_failures=1).run_next("fetch")
    assert bench.step()["state"] == "succeeded", bench.step()
    statement = select(Blob.digest).where(Blob.digest.in_(digests), Blob.condemned_at.is_(None))
    kept = bench.play.database.read(lambda connection: connection.execute(statement).scalars().all())
    assert sorted(kept) == sorted(digests)
    for digest in digests:
        assert bench.store.stat(blob_key(digest)).size_bytes == 1


def test_uploads_are_placed_beside_the_inputs(bench: Bench) -> None:
    data = b"two words"
    file = OutputFile("upload", digest_bytes(data), len(data))
    bench.store.put_bytes(blob_key(file.digest), data)
    uploads.enter_upload(bench.play.database, TENANT, file, None)
    seen = {}

    def act(step_dir: Path, params: dict[str, Any], inputs: dict[str, Path], **_: Any) -> ChildResult:
        seen.update({name: (inputs[name] / "upload").read_bytes() for name in params.get("uploads", {})})
        return ended(step_dir, figures={})

    runner = bench.make_runner(act, max_failures=1)

    def run_reference(path: str) -> dict[str, Any]:
        job_id = bench.play.submit(path, evaluation=file.digest)
        for resource_class in ("fetch", "fetch", "light"):
            claim = bench.play.claim(resource_class)
            assert claim is not None
            bench.play.finish(claim, outputs=[])
        assert runner.run_next("light")
        return next(step for step in bench.play.job(job_id)["steps"] if step["kind"] == "reference")

    jobs.cancel_job(bench.play.database, TENANT, bench.job_id)
    assert run_reference("/other")["state"] == "succeeded"
    assert seen == {"evaluation": data}
    bench.store.delete(blob_key(file.digest))
    lost = run_reference("/third")
    assert (lost["state"], lost["error"]["code"]) == ("failed", "blob_missing")
    assert "Upload the file again" in lost["error"]["message"]


@pytest.mark.usefixtures("hasty")
def test_a_finished_step_waits_for_a_ledger_that_comes_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    finish_step = results.finish_step
    tries = iter([True, True])

    def finish(*arguments: Any) -> None:
        if next(tries, False):
            raise LedgerBusy("Every connection is in use.")
        finish_step(*arguments)

    monkeypatch.setattr(results, "finish_step", finish)
    assert bench.make_runner(make_two_outputs, max_failures=1).run_next("fetch")
    assert bench.step()["state"] == "succeeded"
    assert bench.logs() == [("succeeded", True)]


@pytest.mark.usefixtures("hasty")
def test_a_ledger_that_stays_busy_fails_no_step(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def be_busy(*_: Any) -> None:
        raise LedgerBusy("Every connection is in use.")

    for name in ("report_progress", "is_held", "extend_lease"):
        monkeypatch.setattr(claims, name, be_busy)
    monkeypatch.setattr(results, "finish_step", be_busy)

    def act(step_dir: Path, on_progress: Callable[[str, float], None], **_: Any) -> ChildResult:
        on_progress("hashing", 0.1)
        return ended(step_dir)

    assert bench.make_runner(act, lease_s=0.5, heartbeat_s=0.1, cancel_poll_s=0.05).run_next("fetch")
    assert bench.step()["state"] == "running", "its lease runs out, and it is taken up again"


def test_tenants_that_fetch_the_same_share_no_downloads(bench: Bench) -> None:
    other = Play(bench.play.database, "other", host="elsewhere")
    other.submit()
    for play in (bench.play, other):
        claim = play.claim("fetch")
        assert claim is not None
        play.finish(claim)
    seen = []

    def act(step_dir: Path, params: dict[str, Any], writable: list[Path], **_: Any) -> ChildResult:
        folder = Path(params["cache_dir"])
        assert writable == [folder]
        assert folder.is_dir()
        seen.append(folder)
        return ended(step_dir, figures={"checkpoint_digest": "0" * 64, "files": []})

    runner = bench.make_runner(act)
    assert runner.run_next("fetch")
    assert runner.run_next("fetch")
    assert len(set(seen)) == 2
    assert not any(folder.exists() for folder in seen), "what is fetched needs no partial downloads"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_called_so_wherever_it_is_met(bench: Bench, number: int) -> None:
    def act(step_dir: Path, **_: Any) -> ChildResult:
        raise OSError(number, os.strerror(number), str(step_dir))

    assert bench.make_runner(act).run_next("fetch")
    step = bench.step()
    assert (step["state"], step["error"]["code"]) == ("queued", "disk_full"), step


def test_an_error_that_nobody_foresaw_is_a_bug(bench: Bench) -> None:
    def act(**_: Any) -> ChildResult:
        raise PermissionError(errno.EACCES, "Permission denied", "/nowhere")

    assert bench.make_runner(act).run_next("fetch")
    assert (bench.step()["state"], bench.step()["error"]["code"]) == ("failed", "internal_error")


def test_a_sandbox_that_closes_gives_its_steps_back(bench: Bench) -> None:
    def act(**_: Any) -> ChildResult:
        runner.shut_down()
        raise RuntimeError("The sandbox is closed.")

    runner = bench.make_runner(act)
    assert runner.run_next("fetch")
    assert (bench.step()["state"], bench.step()["error"]) == ("queued", None)


def test_a_refusal_stands_though_the_worker_shuts_down(bench: Bench) -> None:
    def act(step_dir: Path, **_: Any) -> ChildResult:
        runner.shut_down()
        return ended(step_dir, error=SourceNotFound("There is no such folder."))

    runner = bench.make_runner(act)
    assert runner.run_next("fetch")
    assert bench.step()["error"]["code"] == "source_not_found"
