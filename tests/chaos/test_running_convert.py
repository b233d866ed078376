"""A conversion that is cancelled, one whose worker is killed, one that loses the whole service; on one server.

Each test may run alone; together they share the imports of the converter.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.ledger.tables import Publication
from tests.kiln import Document, Kiln, check_published_once, check_store, find_processes, fired_up, is_alive, wait_for

#: A child must be gone 2 s after a cancellation; the rest is for a busy machine.
_CANCELLED_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def kiln(tmp_path_factory: pytest.TempPathFactory, converted_dir: Path, checkpoint: Path) -> Iterator[Kiln]:
    folder = tmp_path_factory.mktemp("running-convert")
    shutil.copytree(converted_dir, folder / "data")
    with fired_up(folder, checkpoint.parent) as kiln:
        yield kiln


def test_cancelling_kills_the_child_and_the_worker_goes_on(kiln: Kiln, checkpoint: Path) -> None:
    worker_pid = kiln.worker_pid
    # The traced engine prints its settings before it starts.
    job_id = kiln.submit(checkpoint, recipes=["none"], formats=["tflite"], engines=["traced"])
    running = kiln.running(job_id, "convert")
    wait_for(lambda: any(path.stat().st_size for path in kiln.step_files(running, "log.txt")), "convert says something")
    children = kiln.step_pids()
    assert children
    wait_for(lambda: "Converting" in kiln.client.logs(job_id, "convert")[0]["text"], "it is shown while it runs")

    called_at = time.monotonic()
    kiln.client.cancel(job_id)
    wait_for(lambda: not any(map(is_alive, children)), "the child is dead")
    assert time.monotonic() - called_at < _CANCELLED_WITHIN_S

    job = kiln.client.get(job_id)
    assert job["state"] == "cancelled"
    assert {variant["state"] for variant in job["variants"]} == {"cancelled"}
    # The child's end is seen before its worker has stored the log.
    wait_for(lambda: kiln.client.logs(job_id, "convert")[0]["text"], "the cancelled attempt's log is kept", 10)
    (log,) = kiln.client.logs(job_id, "convert")
    assert (log["state"], "prefill" in log["text"]) == ("cancelled", True)
    step = kiln.step(job_id, "convert")
    assert step is not None
    assert (step["state"], step["attempts"]) == ("cancelled", 1)

    other = kiln.finished(kiln.submit(checkpoint, recipes=["dynamic_int8"], formats=["tflite"]))
    assert other["state"] == "succeeded", other
    assert kiln.worker_pid == worker_pid
    assert kiln.rows(Publication, job_id=job_id) == []


def test_a_job_survives_the_worker_that_is_killed_while_it_converts(kiln: Kiln, checkpoint: Path) -> None:
    formats = ["tflite", "litertlm"]
    job_id = kiln.submit(checkpoint, recipes=["none"], formats=formats, context_length=40)
    kiln.running(job_id, "convert")
    children = kiln.step_pids()
    worker_pid = kiln.worker_pid
    assert children
    assert worker_pid is not None

    os.kill(worker_pid, signal.SIGKILL)
    wait_for(lambda: not any(map(is_alive, children)), "no step outlives its worker")
    job = kiln.finished(job_id)

    assert kiln.worker_pid not in (None, worker_pid)
    assert "worker ended unexpectedly (signal SIGKILL" in kiln.output
    assert "worker was started again" in kiln.output
    check_recovered(kiln, job, formats)


def test_a_job_survives_the_whole_service_that_is_killed_while_it_converts(kiln: Kiln, checkpoint: Path) -> None:
    formats = ["litertlm"]
    job_id = kiln.submit(checkpoint, recipes=["none", "dynamic_int8"], formats=formats, context_length=32)
    kiln.running(job_id, "convert")
    assert len(find_processes(kiln.folder)) > len(("up", "api", "worker", "beat"))
    done = {step["id"] for step in kiln.client.get(job_id)["steps"] if step["state"] == "succeeded"}

    kiln.kill()
    wait_for(lambda: find_processes(kiln.folder) == {}, "nothing outlives `up`")
    kiln.start()
    job = kiln.finished(job_id)

    check_recovered(kiln, job, [*formats, *formats])
    again = [step["kind"] for step in job["steps"] if step["id"] in done and step["attempts"] > 1]
    assert again == []
    kiln.stop()


def check_recovered(kiln: Kiln, job: Document, formats: list[str]) -> None:
    """Assert that a job whose conversion lost one worker did everything else once, and left nothing half done."""
    assert job["state"] == "succeeded", job
    attempts = kiln.attempts(job["id"])
    assert attempts.pop("convert") == ["lost", "succeeded"]
    # The source's answers are computed beside the conversion: done before the kill, or lost with it.
    assert attempts.pop("reference") in (["succeeded"], ["lost", "succeeded"])
    assert {state for states in attempts.values() for state in states} == {"succeeded"}
    assert len(check_published_once(kiln.database, kiln.data_dir / "store", job["id"])) == len(formats)
    check_store(kiln.data_dir / "store")
    assert len(kiln.client.download(job["id"], kiln.folder / "out" / job["id"])) == len(formats)
    wait_for(lambda: not list((kiln.data_dir / "work").rglob("output")), "killed steps leave no folder behind", 10)
