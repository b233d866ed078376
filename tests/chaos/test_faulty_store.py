"""Jobs on an S3 server that answers wrongly: nothing corrupt is published, and who tries again succeeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from service.ledger import jobs
from service.ledger.states import FINAL_JOB_STATES
from service.settings import load_settings
from service.storage import ObjectStore, S3Options, blob_key, digests, open_store
from tests.chaos import light_catalog, scale
from tests.chaos.census import Census, take_census
from tests.chaos.faulty_proxy import FaultyProxy, alter, faulty_proxy
from tests.chaos.orders import TENANT, Order, write_orders
from tests.chaos.servers import BUCKET, s3_server
from tests.kiln import IMPATIENT, wait_for
from tests.ledger_invariants import read_ledger
from tests.services import make_s3_client
from workers import process, transfer
from workers.catalog import CATALOG, StepCode
from workers.process import WorkerProcess

_CLASSES = ("fetch", "convert", "light")
#: One worker does all jobs, one step after the other, each of which may wait for a silent store several times.
_PATIENCE_S = 600.0 + 60 * scale.STORE_JOBS


@pytest.fixture(scope="module")
def address() -> Iterator[dict[str, str]]:
    with s3_server() as address:
        yield address


class Bench:
    """A worker in this process, with light steps, whose store is an S3 server behind a proxy."""

    def __init__(self, folder: Path, store: ObjectStore, max_failures: int) -> None:
        """`store` is the server itself, to look at."""
        self.folder = folder
        self.store = store
        # Without the host's copies, every input is read from the server.
        bounds = {"max_failures": max_failures, "lease_s": 30, "max_cache_bytes": 0}
        settings = {**IMPATIENT, "data_dir": folder / "data", **bounds}
        self.worker = WorkerProcess(load_settings(settings), lambda _classes: None)

    def submit(self, order: Order) -> str:
        return jobs.submit_job(self.worker.database, TENANT, order.request, max_variants=1).job_id

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Run due steps until `is_done`, which is asked before each."""
        run = self.worker.runner.run_next
        wait_for(lambda: is_done() or (any(map(run, _CLASSES)) and None), "the jobs have ended", _PATIENCE_S)

    def is_ended(self) -> bool:
        return all(job["state"] in FINAL_JOB_STATES for job in read_ledger(self.worker.database)["jobs"])

    def run(self, orders: list[Order]) -> Census:
        ordered = {self.submit(order): order for order in orders}
        self.run_until(self.is_ended)
        return take_census(self.worker.database, self.store, ordered)


@pytest.fixture
def proxy(address: dict[str, str], tmp_path: Path) -> Iterator[FaultyProxy]:
    with faulty_proxy(address["endpoint_url"], scale.SEED, f"/{BUCKET}/{tmp_path.name}/") as proxy:
        yield proxy


@pytest.fixture
def bench(
    request: pytest.FixtureRequest,
    address: dict[str, str],
    proxy: FaultyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Bench]:
    """The parameter is how often a step may fail: several of its objects may go wrong, each more than once."""
    url = f"s3://{BUCKET}/{tmp_path.name}"
    options = S3Options(**address, addressing="path")
    impatient = replace(options, endpoint_url=proxy.url, read_timeout_s=0.5, attempts=1)
    monkeypatch.setattr(process, "open_configured_store", lambda _: open_store(url, impatient))
    monkeypatch.setattr(process, "Sandbox", light_catalog.make_sandbox)
    monkeypatch.setattr(transfer, "_FIRST_PAUSE_S", 0.05)
    for kind, code in light_catalog.light_codes().items():
        monkeypatch.setitem(cast("MutableMapping[str, StepCode]", CATALOG), kind, code)
    bench = Bench(tmp_path, open_store(url, options), getattr(request, "param", 20))
    yield bench
    bench.worker.close()


def test_nothing_corrupt_is_published_and_jobs_recover(
    bench: Bench, proxy: FaultyProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    census = bench.run(write_orders(bench.folder / "models", scale.STORE_JOBS, scale.SEED))
    with capsys.disabled():
        print(f"\nfaulty store, seed {scale.SEED}: {dict(proxy.faults)}\n{census}")
    assert {name: count for name, count in census.faults.items() if count} == {}, str(census)
    assert {"bytes altered", "bytes cut", "no answer", "connection lost", "sent bytes altered"} <= set(proxy.faults)
    for found in bench.store.list("blobs/"):
        # Whatever was sent, what is there is whole.
        digests.read_object(bench.store, found.key, found.key.rpartition("/")[2])


def test_the_control_that_checks_no_digest_takes_what_is_wrong(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def take_all(chunks: Any, key: str, sha256: str) -> Iterator[bytes]:
        return iter(chunks)

    orders = write_orders(bench.folder / "models", scale.STORE_JOBS, scale.SEED)
    with monkeypatch.context() as patch:
        patch.setattr(digests, "check_stream", take_all)
        ordered = {bench.submit(order): order for order in orders}
        bench.run_until(bench.is_ended)
    census = take_census(bench.worker.database, bench.store, ordered)
    assert sum(census.faults.values()) > 0


@pytest.mark.parametrize("bench", [2], indirect=True)
def test_an_object_that_rots_in_the_store_is_replaced_by_a_retry(
    bench: Bench, proxy: FaultyProxy, address: dict[str, str]
) -> None:
    """Of the same size and under the same metadata: nothing but its digest tells."""
    proxy.prefix = "nothing"
    (order,) = write_orders(bench.folder / "models", 1, scale.SEED)
    job_id = bench.submit(order)

    def is_converted() -> bool:
        return any(
            row["kind"] == "convert" and row["state"] == "succeeded"
            for row in read_ledger(bench.worker.database)["steps"]
        )

    bench.run_until(is_converted)
    rows = read_ledger(bench.worker.database)
    (convert,) = [row["id"] for row in rows["steps"] if row["kind"] == "convert"]
    (output,) = [row for row in rows["step_outputs"] if row["step_id"] == convert]
    rot(make_s3_client(address), f"{bench.folder.name}/{blob_key(output['digest'])}")
    bench.run_until(bench.is_ended)
    (job,) = read_ledger(bench.worker.database)["jobs"]
    assert job["state"] == "failed"

    jobs.retry_job(bench.worker.database, TENANT, job_id)
    bench.run_until(bench.is_ended)
    census = take_census(bench.worker.database, bench.store, {job_id: order})
    assert {name: count for name, count in census.faults.items() if count} == {}, str(census)


def rot(client: Any, key: str) -> None:
    """Alter an object behind everybody's back, keeping what is noted about it."""
    found = client.get_object(Bucket=BUCKET, Key=key)
    client.put_object(Bucket=BUCKET, Key=key, Body=alter(found["Body"].read()), Metadata=found["Metadata"])
