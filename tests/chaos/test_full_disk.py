"""A data directory whose disk is full in mid-step: a typed failure, nothing half written, and a way on."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kiln import Document, Kiln, check_published_once, check_store, fired_up, wait_for
from tests.services import give_up

_DISK_BYTES = 128 << 20
_BLOCK_BYTES = 64 << 10


class Disk:
    """A small file system that can be filled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def leave(self, free_bytes: int) -> None:
        """Fill the disk but for so much."""
        with self._filler.open("ab") as filler:
            try:
                while shutil.disk_usage(self.path).free - free_bytes >= _BLOCK_BYTES:
                    filler.write(bytes(_BLOCK_BYTES))
                    filler.flush()
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def clear(self) -> None:
        """Make space again."""
        self._filler.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of its own under a kiln's data directory."""
    path = tmp_path / "data"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(path)]
    made = subprocess.run(mount, capture_output=True, text=True)
    if made.returncode != 0:
        give_up(f"no disk can be made to be filled (needs root): {made.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def kiln(
    disk: Disk, tmp_path: Path, converted_dir: Path, checkpoint: Path, request: pytest.FixtureRequest
) -> Iterator[Kiln]:
    """A server on that disk; the parameter is how often a step may fail."""
    shutil.copytree(converted_dir, disk.path, dirs_exist_ok=True)
    # The ledger is on the full disk too: it writes little, and a sweep that writes seldom leaves it that.
    with fired_up(tmp_path, checkpoint.parent, max_failures=request.param, sweep_s=1) as kiln:
        yield kiln


def float_model_bytes(kiln: Kiln) -> int:
    (job,) = kiln.client.list()
    return int(next(item["size_bytes"] for item in kiln.client.artifacts(job["id"]) if item["kind"] == "tflite"))


@pytest.mark.parametrize("kiln", [2], indirect=True)
def test_a_full_disk_fails_the_step_and_a_retry_succeeds_when_there_is_space(
    kiln: Kiln, disk: Disk, checkpoint: Path
) -> None:
    model_bytes = float_model_bytes(kiln)
    worker_pid = kiln.worker_pid
    # Inputs are links and take no room; the float16 graph, half of the float one, finds none.
    disk.leave(model_bytes // 4)
    job_id = kiln.submit(checkpoint, recipes=["float16"], formats=["tflite"])
    job = kiln.finished(job_id)

    failed = find_failed(job)
    assert job["state"] == "failed"
    assert (failed["kind"], failed["error"]["code"]) == ("quantize", "disk_full"), failed
    assert str(kiln.data_dir) in failed["error"]["message"]
    assert kiln.attempts(job_id)["quantize"] == ["failed", "failed"]
    assert kiln.worker_pid == worker_pid
    check_store(kiln.data_dir / "store")
    assert not any((kiln.data_dir / "store" / ".uploads").iterdir())
    disk.clear()

    kiln.client.retry(job_id)
    job = kiln.finished(job_id)
    assert job["state"] == "succeeded", job
    check_published_once(kiln.database, kiln.data_dir / "store", job_id)
    check_store(kiln.data_dir / "store")


def find_failed(job: Document) -> Document:
    failed: list[Document] = [step for step in job["steps"] if step["state"] == "failed"]
    assert len(failed) == 1
    return failed[0]


@pytest.mark.parametrize("kiln", [1000], indirect=True)
def test_a_disk_without_one_free_byte_stops_the_ledger_and_loses_nothing(
    kiln: Kiln, disk: Disk, checkpoint: Path
) -> None:
    job_id = kiln.submit(checkpoint, recipes=["float16"], formats=["tflite"])
    wait_for(lambda: (kiln.step(job_id, "plan") or {}).get("state") == "running", "plan runs")
    disk.leave(0)
    # The lease of the step that runs cannot be kept, and its failure cannot be written.
    wait_for(lambda: "database or disk is full" in kiln.worker_log, "the ledger cannot be written")
    worker_pid = kiln.worker_pid

    disk.clear()
    job = kiln.finished(job_id)
    assert job["state"] == "succeeded", job
    assert kiln.worker_pid == worker_pid
    check_published_once(kiln.database, kiln.data_dir / "store", job_id)
    check_store(kiln.data_dir / "store")
