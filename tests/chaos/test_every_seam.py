"""Every seam of a worker's work, one by one: a crash at each, and a sweep at each, on the folder and the S3 store."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import delete

from service.ledger import blobs, jobs
from service.ledger.states import FINAL_JOB_STATES
from service.ledger.sweep import Retention
from service.settings import load_settings
from service.storage import ObjectStore
from service.sweep import sweep_store
from tests.chaos import light_catalog, scale
from tests.chaos.census import Census, take_census
from tests.chaos.orders import TENANT, Order, write_orders
from tests.chaos.seams import CLASSES, STORE_READS, STORE_WRITES, Seam, Watch, crash_at, find_seams
from tests.chaos.servers import BUCKET, s3_server
from tests.kiln import IMPATIENT, wait_for
from tests.ledger_invariants import read_ledger
from workers import process
from workers.catalog import CATALOG, StepCode
from workers.process import WorkerProcess

_IS_LONG = scale.JOBS >= 100
#: What only others' eyes depend on, and only now and then.
_UNSTEADY = {"report_log"}
#: Keeps what jobs need and not a moment longer, and waits for nothing; less, since a store may round its times up.
_AT_ONCE = Retention(outputs_s=0, uploads_s=0, unpublished_jobs_s=math.inf, published_jobs_s=math.inf, wait_s=-2)


class Bench:
    """A worker in this process, with light steps and a store."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self.settings = {**IMPATIENT, "data_dir": folder / "data", "max_cache_bytes": 0, **settings}
        self.environment = environment
        self.worker = WorkerProcess(load_settings(self.settings), lambda _classes: None)
        self._orders = iter(write_orders(folder / "models", 5000 if _IS_LONG else 60, scale.SEED, 0))
        self.ordered: dict[str, Order] = {}

    @property
    def store(self) -> ObjectStore:
        return self.worker.store

    def submit(self) -> str:
        """Submit a job that will succeed, and shares no other's work."""
        order = next(each for each in self._orders if each.fate == "succeeded" and each.number % 8 != 7)
        job_id = jobs.submit_job(self.worker.database, TENANT, order.request, max_variants=1).job_id
        self.ordered[job_id] = order
        return job_id

    def run_all(self) -> None:
        """Run due steps until every job has ended."""
        run = self.worker.runner.run_next
        wait_for(lambda: self._are_ended() or (any(map(run, CLASSES)) and None), "the jobs have ended", 600)

    def _are_ended(self) -> bool:
        return all(job["state"] in FINAL_JOB_STATES for job in read_ledger(self.worker.database)["jobs"])

    def find_seams(self) -> list[Seam]:
        """Return the seams that a job meets."""
        self.submit()
        return find_seams(self.worker, self.run_all)

    def count(self) -> Census:
        return take_census(self.worker.database, self.store, self.ordered)


@contextmanager
def make_bench(folder: Path, settings: Mapping[str, Any], environment: Mapping[str, str]) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "Sandbox", light_catalog.make_sandbox)
        for name, value in environment.items():
            patch.setenv(name, value)
        for kind, code in light_catalog.light_codes().items():
            patch.setitem(cast("MutableMapping[str, StepCode]", CATALOG), kind, code)
        bench = Bench(folder, settings, environment)
        yield bench
        bench.worker.close()


@pytest.fixture(params=["folder", "s3"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    if request.param == "folder":
        with make_bench(tmp_path, {}, {}) as bench:
            yield bench
        return
    with s3_server() as address:
        settings = {
            "store_url": f"s3://{BUCKET}/{tmp_path.name}",
            "s3_endpoint_url": address["endpoint_url"],
            "s3_region": address["region"],
        }
        environment = {
            "AWS_ACCESS_KEY_ID": address["access_key_id"],
            "AWS_SECRET_ACCESS_KEY": address["secret_access_key"],
        }
        with make_bench(tmp_path, settings, environment) as bench:
            yield bench


def count_faults(census: Census) -> dict[str, int]:
    return {name: count for name, count in census.faults.items() if count}


def test_every_door_of_a_store_is_known_to_write_or_to_read() -> None:
    doors = {name for name in vars(ObjectStore) if not name.startswith("_")}
    assert doors == STORE_WRITES | STORE_READS


def choose(seams: list[Seam]) -> list[Seam]:
    """Return all, or for the short form each place once, in its midst and after it.

    What others see before it is what they saw after the last one.
    """
    steady = [seam for seam in seams if seam.place not in _UNSTEADY]
    if _IS_LONG:
        return steady
    return list({(seam.place, seam.moment): seam for seam in reversed(steady) if seam.moment != "before"}.values())


@pytest.mark.parametrize("bench", ["folder", *(["s3"] if _IS_LONG else [])], indirect=True)
def test_a_crash_at_any_seam_loses_nothing_and_doubles_nothing(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    seams = bench.find_seams()
    places = {seam.place for seam in seams}
    assert places >= {"claim_next", "finish_step", "record_publications", "put_file", "put_bytes"}
    chosen = choose(seams)
    # Its claims are soon free.
    hasty = {**bench.settings, "lease_s": 0.4, "heartbeat_s": 0.1}
    for seam in chosen:
        bench.submit()
        crash_at(hasty, bench.environment, seam)
        bench.run_all()
    census = bench.count()
    with capsys.disabled():
        print(f"\n{len(chosen)} crashes at {len(places)} places of {len(seams)} seams\n{census}")
    assert count_faults(census) == {}, str(census)
    assert census.counts["jobs succeeded"] == len(chosen) + 1


def sweep_once_a_step(bench: Bench, choose_at: Callable[[str], int]) -> Callable[[Seam], None]:
    """Return what sweeps twice (to condemn, then to delete) at one seam of each step: the one of that number."""
    met: dict[str, int] = {}

    def strike(seam: Seam) -> None:
        # A sweep within a transaction of the same thread would wait for itself.
        if not seam.kind or seam.moment == "inside":
            return
        number = met[seam.kind] = met.get(seam.kind, -1) + 1
        if number == choose_at(seam.kind):
            for _ in range(2):
                list(sweep_store(bench.worker.database, bench.store, _AT_ONCE))

    return strike


def test_a_sweep_at_any_seam_takes_nothing_that_is_needed(bench: Bench) -> None:
    """Condemned and deleted before the upload, between upload and commit, and after: a commit never counts on it."""
    seams = [seam for seam in bench.find_seams() if seam.kind and seam.moment != "inside"]
    most = max(sum(seam.kind == kind for seam in seams) for kind in {seam.kind for seam in seams})
    # Each job is swept at another seam of each of its steps; the short form leaves some out.
    for number in range(0, most, 1 if _IS_LONG else 3):
        bench.submit()
        with Watch(bench.store, sweep_once_a_step(bench, lambda _, number=number: number)).open():  # type: ignore[misc]
            bench.run_all()
    census = bench.count()
    assert count_faults(census) == {}, str(census)
    assert set(census.counts) >= {"jobs succeeded"}
    assert census.counts["jobs succeeded"] == census.counts["jobs"]


def test_the_control_that_commits_what_is_condemned_loses_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    swept = itertools.count()

    def commit_blindly(tx: Any, files: Any, reprieves: Any = None) -> None:
        digests = [file.digest for file in files]
        tx.connection.execute(delete(blobs.Blob).where(blobs.Blob.digest.in_(digests)))
        commit_blobs(tx, files, reprieves)

    def strike(seam: Seam) -> None:
        if (seam.kind, seam.place, seam.moment) == ("fetch", "finish_step", "before"):
            next(swept)
            for _ in range(2):
                list(sweep_store(bench.worker.database, bench.store, _AT_ONCE))

    commit_blobs = blobs.commit_blobs
    monkeypatch.setattr("service.ledger.results.commit_blobs", commit_blindly)
    bench.submit()
    with Watch(bench.store, strike).open():
        bench.run_all()
    assert next(swept) > 0
    assert count_faults(bench.count())
