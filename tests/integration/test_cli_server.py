"""Commands and SDK against a server on a real socket, with the workers played by the test."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from service.cli import app
from service.client import Client
from service.errors import BlobCorrupt, CheckpointInvalid, NotFound
from service.ledger import access, claims
from service.storage import blob_key
from tests.api_world import World

Run = Callable[..., Any]


@pytest.fixture
def play_along(world: World) -> Iterator[threading.Event]:
    """Play a worker in the background as soon as the event is set."""
    go, done = threading.Event(), threading.Event()

    def work() -> None:
        play = world.play()
        go.wait()
        while not done.is_set():
            play.run_all()
            done.wait(0.02)

    thread = threading.Thread(target=work)
    thread.start()
    yield go
    done.set()
    go.set()
    thread.join()


def test_submit_prints_the_id_alone(world: World, run: Run) -> None:
    result = run("submit", world.source["path"], "--recipe", "none", "--priority", 5)
    assert result.exit_code == 0
    job = json.loads(run("job", result.stdout.strip(), "--json").stdout)
    assert (job["state"], job["priority"], job["request"]["recipes"]) == ("queued", 5, ["none"])


def test_submit_once_with_an_idempotency_key(world: World, run: Run) -> None:
    ids = {run("submit", world.source["path"], "--idempotency-key", "x").stdout for _ in range(2)}
    assert len(ids) == 1


WEIGHTS = '{"num_bits":8,"granularity":"CHANNELWISE"}'
CONFIG = f'{{"weight_tensor_config":{WEIGHTS},"compute_precision":"INTEGER"}}'
PROMPTS = '{"prompt": "one"}\n{"prompt": "two"}\n'
OWN = f'[{{"regex":".*","operation":"FULLY_CONNECTED","op_config":{CONFIG}}}]'


def test_files_are_uploaded_and_named_by_digest(run: Run, world: World, tmp_path: Path) -> None:
    text, prompts, recipe = tmp_path / "text.txt", tmp_path / "prompts.txt", tmp_path / "small.json"
    text.write_text('{"prompt": "Räder", "answer": "rollen"}\r\n', newline="")
    prompts.write_text(PROMPTS)
    recipe.write_text(OWN)
    given = ["--evaluation", text, "--calibration-prompts", prompts, "--recipe-file", recipe, "--recipe", "none"]
    submitted = run("submit", world.models / "tiny", *given, "--json")
    assert submitted.exit_code == 0, submitted.output
    request = json.loads(submitted.stdout)["request"]
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    assert request["evaluation"] == digest
    assert request["calibration"] == {"kind": "prompts", "upload": hashlib.sha256(PROMPTS.encode()).hexdigest()}
    assert request["recipes"] == ["none", "small"]
    with world.store.open(blob_key(digest)) as chunks:
        assert b"".join(chunks) == text.read_bytes()
    again = ["--evaluation", f"sha256:{digest}", "--recipe-file", f"small={OWN}"]
    repeated = run("submit", world.models / "tiny", *again, "--json")
    assert repeated.exit_code == 0, repeated.output
    assert json.loads(repeated.stdout)["request"]["own_recipes"] == request["own_recipes"]
    unknown = run("submit", world.models / "tiny", "--evaluation", f"sha256:{'0' * 64}")
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    assert unknown.stderr.startswith("upload_not_found: ")


def test_logs_are_followed_to_the_end_of_the_job(run: Run, world: World, url: str) -> None:
    play = world.play()
    with Client(url) as kiln:
        job_id = kiln.submit(source=world.source, recipes=["none"], formats=["tflite"])["id"]
        claim = play.claim_kind("convert")
        claims.report_log(world.database, claim, "tracing\n", 8)
        pieces = kiln.follow_logs(job_id, "convert")
        assert [next(pieces), next(pieces)] == [f"==> convert {claim.step_id}, attempt 1\n", "tracing\n"]
        claims.report_log(world.database, claim, "lowering\n", 100)
        assert [next(pieces), next(pieces)] == ["... 83 bytes left out ...\n", "lowering\n"]
        play.finish(claim)
        play.run_all()
        assert "convert worked\n" in "".join(pieces)
    followed = run("logs", job_id, "--step", "publish", "--follow")
    assert followed.exit_code == 0
    assert "publish worked" in followed.stdout
    assert run("logs", job_id, "--follow", "--json").exit_code == 2


def test_logs_that_are_followed_are_read_once(world: World, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.client._FOLLOW_S", 0.01)
    play, read, opened = world.play(), world.store.open, []
    monkeypatch.setattr(world.store, "open", lambda key, **options: (opened.append(key), read(key, **options))[1])
    with Client(url) as kiln:
        job_id = kiln.submit(source=world.source, recipes=["none"], formats=["tflite"])["id"]
        claim = play.claim_kind("convert")
        pieces = kiln.follow_logs(job_id)
        printed = ""
        for number in range(5):
            line = f"line {number}\n"
            printed += line
            claims.report_log(world.database, claim, printed, len(printed))
            assert line in pieces
        play.finish(claim)
        play.run_all()
        assert "publish worked\n" in "".join(pieces)
    assert opened
    assert len(opened) == len(set(opened))


@pytest.mark.parametrize(
    ("since", "status"), [("stp_0:1", 422), ("stp_0:1:-1", 422), (f"stp_0:1:{10**30}", 422), ("stp_0:1:5", 200)]
)
def test_where_a_log_goes_on_is_named_by_step_attempt_and_bytes(
    world: World, http: TestClient, since: str, status: int
) -> None:
    job_id = http.post("/v1/jobs", json={"source": world.source}).json()["id"]
    world.play().run_all()
    answer = http.get(f"/v1/jobs/{job_id}/logs", params={"since": since})
    assert answer.status_code == status
    (last, *_) = http.get(f"/v1/jobs/{job_id}/logs").json()["logs"]
    size_bytes = last["size_bytes"]
    name = f"{last['step_id']}:{last['attempt']}:{size_bytes - 5}"
    (entry,) = http.get(f"/v1/jobs/{job_id}/logs", params={"since": name}).json()["logs"]
    assert (entry["text"], entry["size_bytes"], entry["truncated"]) == (last["text"][-5:], size_bytes, False)


@pytest.mark.parametrize("command", ["logs", "download"], ids=["much", "little"])
def test_a_reader_that_has_gone_is_left_in_peace(world: World, url: str, tmp_path: Path, command: str) -> None:
    with Client(url) as kiln:
        job_id = kiln.submit(source=world.source)["id"]
    world.play().run_all()
    program = [sys.executable, "-m", "service.cli", command, job_id, "--url", url]
    arguments = [*program, "-o", str(tmp_path / "out")] if command == "download" else program
    # Output that is held back until the end is where it goes wrong.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_submit_and_wait_shows_progress_then_the_table(world: World, run: Run, play_along: threading.Event) -> None:
    play_along.set()
    result = run("submit", world.source["path"], "--recipe", "none", "--format", "tflite", "--format", "task", "--wait")
    assert result.exit_code == 0
    assert "convert: done in" in result.stderr
    assert "variant none: succeeded" in result.stderr
    assert ["none", "succeeded", "task"] in [line.split()[:3] for line in result.stdout.splitlines()]
    assert "50.0%" in result.stdout
    assert "Exact match of the source: 100.0%." in result.stderr
    again = run("submit", world.source["path"], "--recipe", "none", "--wait", "--json")
    assert json.loads(again.stdout)["state"] == "succeeded"
    assert "convert: reused" in again.stderr


def test_a_failed_job_exits_with_1_and_says_why(world: World, run: Run) -> None:
    job_id = run("submit", world.source["path"]).stdout.strip()
    play = world.play()
    play.fail(play.claim_kind("fetch"), CheckpointInvalid("model.safetensors is truncated."))
    result = run("job", job_id, "--watch")
    assert result.exit_code == 1
    assert "checkpoint_invalid: model.safetensors is truncated." in result.stderr
    logs = run("logs", job_id, "--step", "fetch")
    assert "it went wrong" in logs.stdout
    assert json.loads(run("logs", job_id, "--json").stdout)[-1]["kind"] == "fetch"


def test_retry_and_wait_sees_only_what_is_new(world: World, run: Run, play_along: threading.Event) -> None:
    job_id = run("submit", world.source["path"], "--recipe", "none").stdout.strip()
    play = world.play()
    play.fail(play.claim_kind("convert"), CheckpointInvalid("No."))
    play.run_all()
    assert run("retry", job_id).exit_code == 0
    assert run("retry", job_id).stderr.startswith("conflict: ")
    play.fail(play.claim_kind("convert"), CheckpointInvalid("Again no."))
    play_along.set()
    result = run("retry", job_id, "--wait")
    assert result.exit_code == 0
    assert "checkpoint_invalid" not in result.stderr


def test_jobs_are_listed_and_filtered(world: World, run: Run) -> None:
    ids = [run("submit", world.source["path"]).stdout.strip() for _ in range(3)]
    assert run("cancel", ids[0]).exit_code == 0
    listed = run("jobs", "--json", "--limit", 2)
    assert {job["id"] for job in json.loads(listed.stdout)} == set(ids[1:])
    assert ids[0] in run("jobs", "--state", "cancelled").stdout
    assert ids[1] not in run("jobs", "--state", "cancelled").stdout
    wrong = run("jobs", "--state", "done")
    assert (wrong.exit_code, wrong.stdout) == (2, "")


def test_download_brings_files_and_manifests(world: World, run: Run, tmp_path: Path) -> None:
    job_id = run("submit", world.source["path"], "--recipe", "none", "--format", "task").stdout.strip()
    assert "published nothing" in run("download", job_id, "-o", tmp_path / "out").stderr
    world.play().run_all()
    result = run("download", job_id, "-o", tmp_path / "out", "--json")
    assert json.loads(result.stdout) == [str(tmp_path / "out" / "tiny-none.task")]
    assert (tmp_path / "out" / "tiny-none.task.manifest.json").exists()


def test_a_damaged_blob_is_never_taken_for_the_artifact(world: World, url: str, tmp_path: Path) -> None:
    with Client(url) as client:
        job_id = client.submit(source=world.source, recipes=["none"], formats=["task"])["id"]
        world.play().run_all()
        (artifact,) = client.artifacts(job_id)
        blob = world.settings.data_dir / "store" / blob_key(artifact["sha256"])
        data = bytearray(blob.read_bytes())
        data[-1] ^= 1
        blob.write_bytes(bytes(data))
        with pytest.raises(BlobCorrupt):
            client.download(job_id, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_download_is_resumed_by_range(world: World, url: str, tmp_path: Path) -> None:
    with Client(url) as client:
        job_id = client.submit(source=world.source, recipes=["none"], formats=["task"])["id"]
        world.play().run_all()
        (first,) = client.download(job_id, tmp_path / "first")
        whole = first.read_bytes()
        (tmp_path / "second").mkdir()
        (tmp_path / "second" / "tiny-none.task.part").write_bytes(whole[:1000])
        seen: list[int] = []
        (second,) = client.download(job_id, tmp_path / "second", lambda _name, done, _size: seen.append(done))
    assert second.read_bytes() == whole
    assert seen[0] > 1000


def test_events_arrive_while_the_job_runs(world: World, url: str) -> None:
    with Client(url) as client:
        job_id = client.submit(source=world.source)["id"]
        play = world.play()
        kinds = []
        for event in client.events(job_id):
            kinds.append(event["kind"])
            claim = play.claim()
            if claim is not None:
                play.finish(claim)
        assert client.get(job_id)["state"] == "succeeded"
        assert event["data"]["state"] == "succeeded"
        numbers = [item["number"] for item in client.events(job_id, after=3)]
    assert numbers == list(range(4, len(kinds) + 1))


def test_a_stopping_server_ends_its_streams_and_the_client_goes_on_with_the_next(world: World) -> None:
    events: list[int] = []
    with world.server() as first:
        with Client(first, patience_s=0.0) as client:
            job_id = client.submit(source=world.source)["id"]
            stream = client.events(job_id)
            events.append(next(stream)["number"])
    with world.server() as second, Client(second) as client:
        world.play().run_all()
        events += [event["number"] for event in client.events(job_id, events[-1])]
    assert events == list(range(1, len(events) + 1))


def test_a_key_opens_a_server_that_demands_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    access.ensure_tenant(world.database, "team")
    key = access.create_key(world.database, "team", "ci").secret
    with world.server(host="0.0.0.0") as url:
        runner = CliRunner()
        refused = runner.invoke(app, ["jobs", "--url", url])
        assert (refused.exit_code, refused.stderr[:13]) == (1, "unauthorized:")
        assert runner.invoke(app, ["jobs", "--url", url, "--api-key", key, "--json"]).stdout.strip() == "[]"
        monkeypatch.setenv("EDGEKILN_API_KEY", key)
        assert runner.invoke(app, ["jobs", "--url", url]).exit_code == 0


def test_what_is_not_there_is_a_sentence(run: Run, url: str) -> None:
    for command in (["job"], ["cancel"], ["retry"], ["logs"], ["job", "--watch"]):
        result = run(*command, "job_0")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("not_found: There is no job 'job_0'")
    with Client(url) as client, pytest.raises(NotFound):
        client.get("../recipes")


def test_a_folder_that_the_server_may_not_read_is_a_usage_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    result = run("submit", tmp_path / "elsewhere")
    assert result.exit_code == 2
    assert "folder_not_allowed" in result.stderr
    assert "--source-root" in result.stderr


def test_gc_says_what_would_go_then_condemns_it(
    world: World, url: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(url) as kiln:
        job_id = kiln.submit(source=world.source)["id"]
    world.play().run_all()
    before = sorted(found.key for found in world.store.list())
    nothing = json.loads(run("gc", "--data-dir", world.settings.data_dir, "--json").stdout)
    assert nothing["findings"] == [], "used a moment ago"
    monkeypatch.setenv("EDGEKILN_KEEP_INTERMEDIATES_S", "0")
    promised = json.loads(run("gc", "--data-dir", world.settings.data_dir, "--dry-run", "--json").stdout)
    shown = run("gc", "--data-dir", world.settings.data_dir)
    assert promised["condemned_bytes"] > 0
    assert promised["deleted_bytes"] == 0
    assert "output of convert, not used for 0 seconds" in " ".join(shown.stdout.split())
    assert "0 B freed" in shown.stderr
    again = json.loads(run("gc", "--data-dir", world.settings.data_dir, "--json").stdout)
    assert again["findings"] == [], "condemned once, and not yet to be deleted"
    assert sorted(found.key for found in world.store.list()) == before
    assert run("download", job_id, "-o", world.folder / "out").exit_code == 0


def test_an_ended_job_is_deleted(world: World, run: Run) -> None:
    job_id = run("submit", world.source["path"]).stdout.strip()
    assert "edgekiln cancel" in run("delete", job_id).stderr
    world.play().run_all()
    assert "is deleted." in run("delete", job_id).stderr
    assert run("job", job_id).exit_code == 1
