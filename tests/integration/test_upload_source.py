"""Checkpoints made of uploads: a folder sent to a server that cannot read it, and what its worker makes of that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.client import Client
from service.errors import UploadNotFound
from service.ledger import access, jobs
from service.ledger.tables import JobUpload, Upload
from service.requests import parse_request
from service.storage import blob_key
from tests.api_world import World
from tests.kiln import read_rows
from tests.ledger_play import TOOLCHAIN, Play
from workers.fetch import fetch, resolve
from workers.process import identify_host
from workers.runner import Runner
from workers.sandbox import Sandbox

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 100,
    "tokenizer.json": b"{}",
    "README.md": b"# Tiny",
    "modeling_evil.py": b"raise SystemExit",
}
NEEDED = ["config.json", "model.safetensors", "tokenizer.json"]

Run = Callable[..., Any]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


SOURCE = {"kind": "upload", "files": {name: digest(FILES[name]) for name in NEEDED}, "name": "tiny"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere" / "tiny"
    folder.mkdir(parents=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


def upload(http: TestClient) -> None:
    for name in NEEDED:
        assert http.post("/v1/uploads", content=FILES[name]).status_code == 201


class NoSandbox(Sandbox):
    """There is nothing to do for a child."""

    def __init__(self) -> None:
        pass

    def run(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("no child is needed")


def run_steps(world: World, count: int) -> None:
    """Run the next steps of the class `fetch` on a worker."""
    play = Play(world.database, host=identify_host())
    runner = Runner(
        world.settings, world.database, world.store, NoSandbox(), play.worker_id, TOOLCHAIN, world.folder / "work"
    )
    for _ in range(count):
        assert runner.run_next("fetch")


def read_steps(http: TestClient, job_id: str) -> dict[str, dict[str, Any]]:
    return {step["kind"]: step for step in http.get(f"/v1/jobs/{job_id}").json()["steps"]}


# --- sending a folder ----------------------------------------------------------------------------


def test_a_folder_is_uploaded_and_submitted(world: World, run: Run, folder: Path) -> None:
    first = run("submit", folder, "--upload", "--json")
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["request"]["source"] == SOURCE
    assert first.stderr.count("Uploading") == len(NEEDED)
    stored = {row["digest"] for row in read_rows(world.database, Upload)}
    assert stored == set(SOURCE["files"].values())  # type: ignore[attr-defined]
    (folder / "tokenizer.json").write_text("[]")
    second = run("submit", folder, "--upload")
    assert second.stderr.splitlines() == ["Uploading tokenizer.json (2 B)."]
    third = run("submit", folder, "--upload")
    assert (third.exit_code, third.stderr) == (0, "")
    assert run("jobs").stdout.count("tiny") == 3


def test_only_a_server_on_this_machine_is_asked_to_read_the_folder(
    world: World, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = run("submit", folder)
    assert "folder_not_allowed" in near.stderr
    assert "edgekiln submit --upload" in near.stderr
    monkeypatch.setattr(Client, "is_local", False)
    far = run("submit", folder, "--json")
    assert json.loads(far.stdout)["request"]["source"]["kind"] == "upload"
    told = run("submit", world.models / "tiny", "--no-upload", "--json")
    assert json.loads(told.stdout)["request"]["source"]["kind"] == "folder"


@pytest.mark.parametrize(
    ("url", "expected"),
    [("http://127.0.0.1:8711", True), ("http://[::1]:1", True), ("https://kiln.example", False)],
)
def test_a_client_knows_whether_its_server_is_here(url: str, expected: bool) -> None:
    with Client(url) as client:
        assert client.is_local is expected


def test_the_client_submits_a_folder(url: str, folder: Path) -> None:
    sent: list[str] = []
    with Client(url) as kiln:
        for _ in range(2):
            job = kiln.submit_folder(folder, recipes=["none"], on_upload=lambda file: sent.append(file.name))
            assert (job["request"]["source"], job["request"]["recipes"]) == (SOURCE, ["none"])
        with pytest.raises(UploadNotFound):
            kiln.submit(source=SOURCE, evaluation="0" * 64, files={})
    assert sorted(sent) == NEEDED


def test_a_folder_that_is_no_checkpoint_is_refused_before_anything_is_sent(
    world: World, run: Run, folder: Path
) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    result = run("submit", folder, "--upload")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("checkpoint_unsafe: ")
    assert read_rows(world.database, Upload) == []


# --- what may be named ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({}, "invalid_request"),
        ({"../config.json": "0" * 64}, "invalid_request"),
        ({"pytorch_model.bin": "0" * 64}, "invalid_request"),
        ({"config.json": "sha"}, "invalid_request"),
        ({"config.json": SOURCE["files"]["config.json"]}, "checkpoint_invalid"),  # type: ignore[index]
        ({**SOURCE["files"], "merges.txt": "0" * 64}, "upload_not_found"),  # type: ignore[dict-item]
    ],
)
def test_a_request_is_refused_with_a_reason(http: TestClient, files: dict[str, str], code: str) -> None:
    upload(http)
    answer = http.post("/v1/jobs", json={"source": {"kind": "upload", "files": files}})
    assert (answer.status_code, answer.json()["code"]) == (422, code)


def test_another_tenants_files_cannot_be_named(world: World, http: TestClient) -> None:
    upload(http)
    access.ensure_tenant(world.database, "other")
    key = access.create_key(world.database, "other", "test").secret
    foreign = http.post("/v1/jobs", json={"source": SOURCE}, headers={"Authorization": f"Bearer {key}"})
    assert (foreign.status_code, foreign.json()["code"]) == (422, "upload_not_found")
    with pytest.raises(UploadNotFound):
        jobs.submit_job(world.database, "other", parse_request({"source": SOURCE}), max_variants=1)
    assert http.post("/v1/jobs", json={"source": SOURCE}).status_code == 201


def test_a_job_holds_its_files(world: World, http: TestClient) -> None:
    upload(http)
    job = http.post("/v1/jobs", json={"source": SOURCE}).json()
    held = {row["digest"] for row in read_rows(world.database, JobUpload, JobUpload.job_id == job["id"])}
    assert held == set(SOURCE["files"].values())  # type: ignore[attr-defined]


# --- the worker ----------------------------------------------------------------------------------


def test_the_uploads_become_the_checkpoint_without_being_moved(
    world: World, http: TestClient, folder: Path, tmp_path: Path
) -> None:
    upload(http)
    job_id = http.post("/v1/jobs", json={"source": SOURCE}).json()["id"]
    run_steps(world, 2)
    job = http.get(f"/v1/jobs/{job_id}").json()
    steps = read_steps(http, job_id)
    assert (steps["resolve"]["state"], steps["fetch"]["state"], steps["plan"]["state"]) == (
        "succeeded",
        "succeeded",
        "queued",
    )
    # The same files from a folder are the same checkpoint.
    pinned = resolve.run({"source": {"kind": "folder", "path": str(folder)}}, {}, tmp_path, lambda *_: None)
    (tmp_path / "out").mkdir()
    figures = fetch.run({"source": pinned["source"]}, {}, tmp_path / "out", lambda *_: None)
    assert job["source"] == {
        "kind": "upload",
        "files": SOURCE["files"],
        "revision": figures["checkpoint_digest"],
    }


def test_the_same_files_are_fetched_once_whatever_they_are_called(world: World, http: TestClient) -> None:
    upload(http)
    first = http.post("/v1/jobs", json={"source": SOURCE}).json()["id"]
    run_steps(world, 2)
    second = http.post("/v1/jobs", json={"source": {**SOURCE, "name": "other"}}).json()["id"]
    run_steps(world, 1)
    assert read_steps(http, second)["fetch"]["reused"]
    assert not read_steps(http, first)["fetch"]["reused"]


def test_bytes_that_are_gone_are_missed_by_name(world: World, http: TestClient) -> None:
    upload(http)
    job_id = http.post("/v1/jobs", json={"source": SOURCE}).json()["id"]
    world.store.delete(blob_key(digest(FILES["tokenizer.json"])))
    run_steps(world, 2)
    error = read_steps(http, job_id)["fetch"]["error"]
    assert (error["code"], "tokenizer.json" in error["message"]) == ("blob_missing", True)
    # Uploaded again, the job goes on.
    assert http.post("/v1/uploads", content=FILES["tokenizer.json"]).status_code == 200
    assert http.post(f"/v1/jobs/{job_id}/retry").status_code == 200
    run_steps(world, 2)
    assert read_steps(http, job_id)["fetch"]["state"] == "succeeded"
