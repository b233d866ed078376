"""The restore drill: back up a server at work, lose everything, restore it, and go on."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.chaos.conftest import Fire
from tests.kiln import Kiln, check_published_once, check_store


def run_edgekiln(kiln: Kiln, *arguments: str) -> dict[str, Any]:
    """Run a command on the kiln's data directory; return what it prints."""
    command = [*kiln.program, *arguments, "--json"]
    done = subprocess.run(command, env=kiln.environment, cwd=kiln.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_a_server_at_work_is_backed_up_lost_restored_and_goes_on(fire: Fire, checkpoint: Path) -> None:
    kiln = fire()
    finished_id = next(kiln.client.list())["id"]
    before = {artifact["name"]: artifact["sha256"] for artifact in kiln.client.artifacts(finished_id)}
    job_id = kiln.submit(checkpoint, recipes=["none", "dynamic_int8"], formats=["tflite"])
    kiln.running(job_id, "quantize")
    backup = str(kiln.folder / "backup")
    head = run_edgekiln(kiln, "backup", backup)
    assert head["faults"] == {}

    kiln.kill()
    shutil.rmtree(kiln.data_dir)
    assert run_edgekiln(kiln, "restore", backup)["ledger"] == head["ledger"]
    kiln.start()

    # What was published is served, byte for byte.
    after = {artifact["name"]: artifact["sha256"] for artifact in kiln.client.artifacts(finished_id)}
    assert after == before
    assert len(kiln.client.download(finished_id, kiln.folder / "out")) == len(before)
    # What was under way goes on, and nothing that was done is done again.
    job = kiln.finished(job_id)
    assert job["state"] == "succeeded", job
    assert "convert" not in kiln.attempts(job_id)
    assert kiln.attempts(job_id)["quantize"][-1] == "succeeded"
    check_published_once(kiln.database, kiln.data_dir / "store", job_id)
    check_store(kiln.data_dir / "store")
    # What is found in the ledger is in the store.
    assert [row for row in run_edgekiln(kiln, "gc", "--dry-run")["findings"] if row["fate"] == "missing"] == []
