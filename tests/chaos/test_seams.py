"""A worker that dies at any seam of a publication of two formats, or wakes there: nothing is there twice or half.

Every other step's seams are those of `test_every_seam`.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.ledger import claims, jobs, views
from service.ledger.database import Database
from service.ledger.states import StepState
from service.ledger.tables import Publication, Step
from service.requests import parse_request
from service.settings import Settings, load_settings
from service.storage import blob_key, open_configured_store
from tests.chaos.faulty_worker import PUBLISH_SEAMS
from tests.kiln import (
    IMPATIENT,
    PATIENCE_S,
    ROOT,
    check_published_once,
    check_store,
    clean_environment,
    find_processes,
    kill_all,
    read_attempts,
    read_rows,
    wait_for,
)
from workers.process import WorkerProcess

TENANT = "default"
FORMATS = ["tflite", "litertlm"]
_SETTINGS = {**IMPATIENT, "lease_s": 1}
_CLASSES = ("fetch", "light")


def make_settings(folder: Path) -> Settings:
    return load_settings({**_SETTINGS, "data_dir": folder / "data"})


@contextmanager
def worker(settings: Settings) -> Iterator[WorkerProcess]:
    """Yield a worker process that lives in this one, and runs what it is told to."""
    process = WorkerProcess(settings, lambda _classes: None)
    try:
        yield process
    finally:
        process.close()


def run_until(process: WorkerProcess, is_done: Callable[[], bool], what: str) -> None:
    """Run due steps until `is_done`, which is asked before each."""
    wait_for(lambda: is_done() or (any(map(process.runner.run_next, _CLASSES)) and None), what)


def submit(database: Database, checkpoint: Path) -> str:
    # Not the recipe that was published before: manifests are deterministic, and theirs would be there already.
    request = {"source": {"kind": "folder", "path": str(checkpoint)}, "recipes": ["dynamic_int8"], "formats": FORMATS}
    return jobs.submit_job(database, TENANT, parse_request(request), max_variants=9).job_id


def find_step(database: Database, job_id: str, kind: str) -> dict[str, Any] | None:
    steps = views.read_job(database, TENANT, job_id)["steps"]
    return next((step for step in steps if step["kind"] == kind), None)


def is_in_state(database: Database, job_id: str, kind: str, state: str) -> bool:
    step = find_step(database, job_id, kind)
    return step is not None and step["state"] == state


def start_faulty_worker(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = clean_environment(folder, {**_SETTINGS, "data_dir": folder / "data"})
    with (folder / "faulty.log").open("ab") as log:
        command = [sys.executable, "-m", "tests.chaos.faulty_worker", *arguments]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)


def crash(folder: Path, seam: str) -> None:
    """Let a worker die at a seam; leave nothing of it."""
    process = start_faulty_worker(folder, seam, "SIGKILL")
    try:
        assert process.wait(PATIENCE_S) == -signal.SIGKILL, (folder / "faulty.log").read_text()
        wait_for(lambda: not find_processes(folder), "no step outlives its worker")
    finally:
        kill_all(folder)


@pytest.fixture(scope="session")
def publishable_dir(
    tmp_path_factory: pytest.TempPathFactory, converted_dir: Path, checkpoint: Path
) -> tuple[Path, str]:
    """A data directory where a job has nothing left to do but to publish; and the job's id."""
    folder = tmp_path_factory.mktemp("publishable")
    shutil.copytree(converted_dir, folder / "data")
    with worker(make_settings(folder)) as process:
        job_id = submit(process.database, checkpoint)
        run_until(process, lambda: is_in_state(process.database, job_id, "publish", "queued"), "publish is due")
    return folder / "data", job_id


@pytest.fixture
def publishable(tmp_path: Path, publishable_dir: tuple[Path, str]) -> tuple[Path, str]:
    """A folder with a copy of that data directory, and the job's id."""
    shutil.copytree(publishable_dir[0], tmp_path / "data")
    return tmp_path, publishable_dir[1]


@pytest.mark.parametrize("seam", PUBLISH_SEAMS)
def test_a_publish_that_crashes_anywhere_publishes_once(seam: str, publishable: tuple[Path, str]) -> None:
    folder, job_id = publishable
    settings = make_settings(folder)
    crash(folder, seam)

    with worker(settings) as process:
        is_committed = seam == "after_finish"
        assert bool(views.list_artifacts(process.database, TENANT, job_id)) == is_committed
        before = {row["kind"]: row for row in read_rows(process.database, Publication, Publication.job_id == job_id)}
        assert bool(before) == (seam not in ("before_rows", "inside_rows"))

        def is_final() -> bool:
            return bool(views.read_job(process.database, TENANT, job_id)["is_final"])

        run_until(process, is_final, "the job has ended")

        assert views.read_job(process.database, TENANT, job_id)["state"] == "succeeded"
        expected = ["succeeded"] if is_committed else ["lost", "succeeded"]
        assert read_attempts(process.database, job_id)["publish"] == expected
        rows = check_published_once(process.database, folder / "data" / "store", job_id)
        assert {row["kind"] for row in rows} == set(FORMATS)
        for row in rows:
            recorded = before.get(row["kind"], row)
            assert (row["id"], row["manifest_digest"]) == (recorded["id"], recorded["manifest_digest"])
            target = folder / row["name"]
            open_configured_store(settings).get_file(blob_key(row["digest"]), target, row["digest"])
            assert hashlib.sha256(target.read_bytes()).hexdigest() == row["digest"]
        check_store(folder / "data" / "store")
        named = {row["manifest_digest"] for row in read_rows(process.database, Publication)}
        assert {path.stem for path in (folder / "data" / "store" / "manifests").iterdir()} == named


@pytest.mark.parametrize(
    ("seam", "fence"), [("before_rows", "fence"), ("before_finish", "fence"), ("before_finish", "no fence")]
)
def test_a_zombie_writes_nothing_and_would_without_the_fence(
    seam: str, fence: str, publishable: tuple[Path, str]
) -> None:
    """A worker is stopped with everything in its hands, loses its step to another, and is woken."""
    folder, job_id = publishable
    settings = make_settings(folder)
    zombie = start_faulty_worker(folder, seam, "SIGSTOP", *(["--no-fence"] if fence == "no fence" else []))
    try:
        with worker(settings) as process:
            wait_for(lambda: is_stopped(zombie.pid), "the zombie has stopped")
            claim = wait_for(
                lambda: claims.claim_next(process.database, process.worker_id, "light", process.runner.policy),
                "another worker takes over",
            )
            assert (claim.kind, claim.token) == ("publish", 2)
            claims.extend_lease(process.database, claim, PATIENCE_S)
            zombie.send_signal(signal.SIGCONT)
            assert zombie.wait(PATIENCE_S) == 0, (folder / "faulty.log").read_text()

            (step,) = read_rows(process.database, Step, Step.id == claim.step_id)
            visible = views.list_artifacts(process.database, TENANT, job_id)
            if fence == "no fence":
                assert step["state"] == StepState.SUCCEEDED, "the control must write under the new holder's token"
                assert visible
                return
            assert (step["state"], step["token"], step["worker_id"]) == ("running", 2, process.worker_id)
            assert visible == []
            assert read_attempts(process.database, job_id)["publish"] == ["lost", "running"]
            # Whoever holds it now ends it.
            claims.release_step(process.database, claim)
            run_until(process, lambda: is_in_state(process.database, job_id, "publish", "succeeded"), "published")
            check_published_once(process.database, folder / "data" / "store", job_id)
    finally:
        kill_all(folder)
        zombie.wait()


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
