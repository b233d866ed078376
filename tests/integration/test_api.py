"""The REST API over a real ledger and store: what callers get, and what they are refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from service.api import schemas
from service.errors import CheckpointInvalid, StoreUnavailable
from service.ledger import access, claims, views
from service.storage import blob_key
from tests.api_world import ARTIFACT_BYTES, World, make_world


@dataclass(frozen=True)
class Shop:
    """A service with one published artifact, for tests that only look."""

    world: World
    http: TestClient
    artifact: dict[str, Any]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with make_world(tmp_path_factory.mktemp("shop")) as world, world.http() as client:
        yield Shop(world, client, publish_one(world, client))


def submit(http: TestClient, world: World, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/jobs", json={"source": world.source, **fields})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def require_problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    schemas.Problem.model_validate(problem)
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["type"] == f"urn:edgekiln:error:{code}"
    return dict(problem)


# --- jobs ---------------------------------------------------------------------------------------


def test_a_submitted_job_is_there_when_the_answer_arrives(world: World, http: TestClient) -> None:
    answer = http.post("/v1/jobs", json={"source": world.source, "recipes": ["none", "float16"]})
    job = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    schemas.JobDocument.model_validate(job)
    assert [variant["name"] for variant in job["variants"]] == ["none", "float16"]
    assert http.get(answer.headers["location"]).json() == job
    assert world.pokes == [["fetch"]]


def test_a_finished_job_reads_as_the_schema_says(world: World, http: TestClient) -> None:
    job = submit(http, world, recipes=["none"], formats=["tflite", "litertlm"], devices=["host"])
    world.play().run_all()
    document = http.get(f"/v1/jobs/{job['id']}").json()
    schemas.JobDocument.model_validate(document)
    (variant,) = document["variants"]
    assert document["state"] == "succeeded"
    assert [artifact["kind"] for artifact in variant["artifacts"]] == ["litertlm", "tflite"]
    assert variant["parity"]["kl_mean"] == 0.125
    assert [item["format"] for item in variant["measurements"]] == ["tflite", "litertlm"]
    formats = {step["format"] for step in document["steps"] if step["kind"] == "verify"}
    assert formats == {"tflite", "litertlm"}
    (quantize,) = [step for step in document["steps"] if step["kind"] == "quantize"]
    assert quantize["variants"] == ["none"]


def test_an_idempotency_key_makes_one_job(world: World, http: TestClient) -> None:
    body = {"source": world.source}
    first = http.post("/v1/jobs", json=body, headers={"Idempotency-Key": "nightly"})
    second = http.post("/v1/jobs", json=body, headers={"Idempotency-Key": "nightly"})
    other = http.post("/v1/jobs", json={**body, "recipes": ["none"]}, headers={"Idempotency-Key": "nightly"})
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json()["id"] == second.json()["id"]
    assert second.headers["location"] == first.headers["location"]
    require_problem(other, 409, "idempotency_mismatch")


def test_pages_follow_each_other_without_gap_or_repeat(world: World, http: TestClient) -> None:
    made = [submit(http, world)["id"] for _ in range(5)]
    seen: list[str] = []
    before: str | None = None
    sizes = []
    while True:
        page = http.get("/v1/jobs", params={"limit": 2, **({"before": before} if before else {})}).json()
        schemas.JobList.model_validate(page)
        sizes.append(len(page["jobs"]))
        seen += [job["id"] for job in page["jobs"]]
        before = page["next"]
        if before is None:
            break
    assert sizes == [2, 2, 1]
    assert sorted(seen) == sorted(made)
    assert [job["created_at"] for job in http.get("/v1/jobs").json()["jobs"]] == sorted(
        (job["created_at"] for job in http.get("/v1/jobs").json()["jobs"]), reverse=True
    )


def test_a_page_that_ends_exactly_is_the_last(world: World, http: TestClient) -> None:
    for _ in range(2):
        submit(http, world)
    assert http.get("/v1/jobs", params={"limit": 2}).json()["next"] is None


def test_jobs_are_filtered_by_states(world: World, http: TestClient) -> None:
    cancelled = submit(http, world)["id"]
    http.post(f"/v1/jobs/{cancelled}/cancel")
    queued = submit(http, world)["id"]
    find = lambda query: {job["id"] for job in http.get(f"/v1/jobs?{query}").json()["jobs"]}  # noqa: E731
    assert find("state=cancelled") == {cancelled}
    assert find("state=queued&state=cancelled") == {cancelled, queued}
    assert find("state=failed") == set()


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("state=done", 422, "invalid_request"),
        ("limit=0", 422, "invalid_request"),
        ("limit=201", 422, "invalid_request"),
        ("limit=many", 422, "invalid_request"),
        ("before=job_0", 404, "not_found"),
    ],
)
def test_a_list_that_cannot_be_is_refused(shop: Shop, query: str, status: int, code: str) -> None:
    require_problem(shop.http.get(f"/v1/jobs?{query}"), status, code)


def test_cancelling_twice_is_cancelling_once(world: World, http: TestClient) -> None:
    job_id = submit(http, world)["id"]
    for _ in range(2):
        answer = http.post(f"/v1/jobs/{job_id}/cancel")
        assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")


def test_what_has_succeeded_is_neither_cancelled_nor_retried(world: World, http: TestClient) -> None:
    job_id = submit(http, world)["id"]
    require_problem(http.post(f"/v1/jobs/{job_id}/retry"), 409, "conflict")
    world.play().run_all()
    for action in ("cancel", "retry"):
        require_problem(http.post(f"/v1/jobs/{job_id}/{action}"), 409, "conflict")


def test_a_failed_job_runs_again_after_a_retry(world: World, http: TestClient) -> None:
    job_id = submit(http, world)["id"]
    play = world.play()
    play.fail(play.claim_kind("fetch"), CheckpointInvalid("config.json is not JSON."))
    failed = http.get(f"/v1/jobs/{job_id}").json()
    assert (failed["state"], failed["variants"][0]["error"]["code"]) == ("failed", "checkpoint_invalid")
    answer = http.post(f"/v1/jobs/{job_id}/retry")
    assert (answer.status_code, answer.json()["state"]) == (200, "queued")
    play.run_all()
    assert http.get(f"/v1/jobs/{job_id}").json()["state"] == "succeeded"


def test_the_catalogue_names_what_a_job_may_ask_for(shop: Shop) -> None:
    catalogue = shop.http.get("/v1/recipes").json()
    schemas.Catalogue.model_validate(catalogue)
    assert "dynamic_int8" in [recipe["name"] for recipe in catalogue["recipes"]]
    assert catalogue["formats"] == ["tflite", "task", "litertlm"]
    assert "min_exact_match" in catalogue["gates"]


# --- requests that cannot work --------------------------------------------------------------------

_HUB = {"kind": "hub", "repo": "owner/name"}


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({}, "invalid_request", "source"),
        ({"source": {"kind": "floppy"}}, "invalid_request", "source"),
        ({"source": {"kind": "folder", "path": "relative"}}, "invalid_request", "absolute"),
        ({"source": {"kind": "hub", "repo": "nonsense"}}, "invalid_request", "OWNER/NAME"),
        ({"source": _HUB, "recipes": ["int8"]}, "unknown_name", "dynamic_int8"),
        ({"source": _HUB, "formats": ["litertml"]}, "unknown_name", "litertlm"),
        ({"source": _HUB, "engines": ["reauthord"]}, "unknown_name", "reauthored"),
        ({"source": _HUB, "gates": {"min_exact": 1}}, "unknown_name", "min_exact_match"),
        ({"source": _HUB, "recipes": []}, "invalid_request", "recipes"),
        ({"source": _HUB, "colour": "red"}, "invalid_request", "colour"),
        ({"source": _HUB, "context_length": 8, "prefill_lengths": [16]}, "invalid_request", "larger than the context"),
        ({"source": _HUB, "gates": {"min_decode_tokens_per_s": 1}}, "invalid_request", "device"),
        ([], "invalid_request", "JSON object"),
    ],
)
def test_a_request_is_refused_before_anything_is_stored(shop: Shop, body: Any, code: str, words: str) -> None:
    problem = require_problem(shop.http.post("/v1/jobs", json=body), 422, code)
    assert words in problem["detail"]
    assert len(views.list_jobs(shop.world.database, "default")) == 1


def test_too_many_variants_are_refused(world: World) -> None:
    with world.http(max_variants=1) as http:
        answer = http.post("/v1/jobs", json={"source": world.source, "recipes": ["none", "float16"]})
        assert require_problem(answer, 422, "invalid_request")["details"] == {"variants": 2, "limit": 1}


@pytest.mark.parametrize(
    ("content", "kind"), [("{", "application/json"), ('{"source": 1}', "text/plain"), ("", "application/json")]
)
def test_a_body_that_is_not_json_is_refused(shop: Shop, content: str, kind: str) -> None:
    problem = require_problem(
        shop.http.post("/v1/jobs", content=content, headers={"Content-Type": kind}), 422, "invalid_request"
    )
    assert "JSON" in problem["detail"]


# --- web folders ------------------------------------------------------------------------------------


def test_only_web_hosts_that_the_operator_allows_may_be_named(world: World) -> None:
    allowed, other = ({"kind": "https", "url": f"https://{name}/m/"} for name in ("a.example.org", "b.example"))
    with world.http(source_hosts=("*.example.org",)) as http:
        assert http.post("/v1/jobs", json={"source": allowed}).status_code == 201
        problem = require_problem(http.post("/v1/jobs", json={"source": other}), 403, "source_not_allowed")
    assert "EDGEKILN_SOURCE_HOSTS" in problem["detail"]
    plain = {"kind": "https", "url": "http://127.0.0.1:8080/m/"}
    with world.http() as http:
        require_problem(http.post("/v1/jobs", json={"source": plain}), 403, "source_not_allowed")
    with world.http(private_source_hosts=("127.0.0.1:8080",)) as http:
        assert http.post("/v1/jobs", json={"source": plain}).status_code == 201


# --- folders ----------------------------------------------------------------------------------------


def test_a_folder_outside_the_roots_is_refused_whether_it_exists_or_not(world: World, http: TestClient) -> None:
    for path in ("/etc", "/no/such/folder", str(world.models / ".." / "data"), str(world.folder)):
        answer = http.post("/v1/jobs", json={"source": {"kind": "folder", "path": path}})
        problem = require_problem(answer, 403, "folder_not_allowed")
        assert "edgekiln up --source-root" in problem["detail"]


def test_a_symlink_out_of_the_roots_is_refused(world: World, http: TestClient) -> None:
    (world.models / "sly").symlink_to("/etc")
    answer = http.post("/v1/jobs", json={"source": {"kind": "folder", "path": str(world.models / "sly")}})
    require_problem(answer, 403, "folder_not_allowed")


def test_a_symlink_within_the_roots_is_stored_as_what_it_means(world: World, http: TestClient) -> None:
    (world.models / "latest").symlink_to(world.models / "tiny")
    answer = http.post("/v1/jobs", json={"source": {"kind": "folder", "path": str(world.models / "latest")}})
    assert answer.json()["request"]["source"]["path"] == str(world.models / "tiny")


def test_a_root_behind_a_symlink_is_a_root(world: World, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(world.models)
    with world.http(source_roots=((tmp_path / "alias").resolve(),)) as http:
        path = str(tmp_path / "alias" / "tiny")
        assert http.post("/v1/jobs", json={"source": {"kind": "folder", "path": path}}).status_code == 201


def test_a_missing_folder_below_a_root_is_not_found(world: World, http: TestClient) -> None:
    (world.models / "file").write_text("")
    (world.models / "loop").symlink_to(world.models / "loop")
    for name in ("missing", "file", "loop", "x" * 300):
        answer = http.post("/v1/jobs", json={"source": {"kind": "folder", "path": str(world.models / name)}})
        require_problem(answer, 422, "source_not_found")


def test_without_roots_no_folder_is_allowed(world: World) -> None:
    with world.http(source_roots=()) as http:
        require_problem(http.post("/v1/jobs", json={"source": world.source}), 403, "folder_not_allowed")


# --- the edge: hosts, origins, keys, sizes ----------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1:8711", "localhost", "LOCALHOST.:9", "[::1]:8711", "127.8.9.1"])
def test_loopback_names_are_this_server(shop: Shop, host: str) -> None:
    assert shop.http.get("/v1/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8711", "10.1.2.3", ""]
)
def test_other_names_are_not_this_server(shop: Shop, host: str) -> None:
    for path in ("/v1/jobs", "/healthz", "/openapi.json", "/nowhere"):
        problem = require_problem(shop.http.get(path, headers={"Host": host}), 421, "host_not_allowed")
        assert "--allow-host" in problem["detail"]


def test_a_page_of_another_origin_changes_nothing(world: World, http: TestClient) -> None:
    job_id = submit(http, world)["id"]
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999"):
        answer = http.post(f"/v1/jobs/{job_id}/cancel", headers={"Origin": origin})
        require_problem(answer, 403, "origin_not_allowed")
    own = http.post(f"/v1/jobs/{job_id}/cancel", headers={"Origin": "http://127.0.0.1:8711"})
    assert own.status_code == 200


def test_any_other_address_demands_a_key(world: World) -> None:
    access.ensure_tenant(world.database, "team")
    key = access.create_key(world.database, "team", "ci")
    with world.http(base_url="http://kiln.example", host="0.0.0.0", allowed_hosts=("kiln.example",)) as http:
        for path in ("/v1/jobs", "/openapi.json", "/nowhere", "/v1/recipes"):
            answer = http.get(path)
            require_problem(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"].startswith("Bearer")
        headers = {"Authorization": f"Bearer {key.secret}"}
        assert http.get("/v1/jobs", headers=headers).status_code == 200
        assert http.get("/healthz").json() == {"status": "ok"}
        bare = http.get("/readyz").json()
        assert all(set(check) == {"ok"} for check in bare["checks"].values())
        assert "workers" in http.get("/readyz", headers=headers).json()
        access.revoke_key(world.database, "team", key.id)
        require_problem(http.get("/v1/jobs", headers=headers), 401, "unauthorized")


@pytest.mark.parametrize("header", ["Bearer ek_wrong", "Bearer ", "Basic dXNlcjpwYXNz", "ek_wrong"])
def test_a_wrong_key_is_refused_on_loopback_too(shop: Shop, header: str) -> None:
    require_problem(shop.http.get("/v1/jobs", headers={"Authorization": header}), 401, "unauthorized")


def test_a_name_of_the_network_demands_a_key_though_the_server_listens_on_loopback(world: World) -> None:
    # Behind a reverse proxy everybody comes from loopback.
    with world.http(base_url="http://kiln.example", allowed_hosts=("kiln.example",)) as http:
        require_problem(http.get("/v1/jobs"), 401, "unauthorized")


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "X-Forwarded-Host"])
def test_what_a_proxy_passes_on_demands_a_key_whatever_host_it_names(shop: Shop, header: str) -> None:
    assert shop.http.get("/v1/jobs").status_code == 200
    require_problem(shop.http.get("/v1/jobs", headers={header: "203.0.113.9"}), 401, "unauthorized")


def test_an_expired_key_is_refused(world: World, http: TestClient) -> None:
    key = access.create_key(world.database, "default", "old", lifetime_s=-1)
    require_problem(http.get("/v1/jobs", headers={"Authorization": f"Bearer {key.secret}"}), 401, "unauthorized")


def test_tenants_see_nothing_of_each_other(world: World, http: TestClient) -> None:
    job_id = submit(http, world)["id"]
    world.play().run_all()
    artifact_id = http.get(f"/v1/jobs/{job_id}/artifacts").json()["artifacts"][0]["id"]
    access.ensure_tenant(world.database, "other")
    headers = {"Authorization": f"Bearer {access.create_key(world.database, 'other', 'theirs').secret}"}
    assert http.get("/v1/jobs", headers=headers).json()["jobs"] == []
    for path in ("", "/events", "/logs", "/artifacts"):
        require_problem(http.get(f"/v1/jobs/{job_id}{path}", headers=headers), 404, "not_found")
    for path in ("", "/manifest"):
        require_problem(http.get(f"/v1/artifacts/{artifact_id}{path}", headers=headers), 404, "not_found")
    for action in ("cancel", "retry"):
        require_problem(http.post(f"/v1/jobs/{job_id}/{action}", headers=headers), 404, "not_found")
    require_problem(http.delete(f"/v1/jobs/{job_id}", headers=headers), 404, "not_found")
    assert http.delete(f"/v1/jobs/{job_id}").status_code == 204, "control: it is there"


def test_an_ended_job_is_deleted_with_its_artifacts(world: World, http: TestClient) -> None:
    job_id = submit(http, world)["id"]
    require_problem(http.delete(f"/v1/jobs/{job_id}"), 409, "conflict")
    world.play().run_all()
    artifact_id = http.get(f"/v1/jobs/{job_id}/artifacts").json()["artifacts"][0]["id"]
    assert http.delete(f"/v1/jobs/{job_id}").status_code == 204
    for path in (f"/v1/jobs/{job_id}", f"/v1/artifacts/{artifact_id}"):
        require_problem(http.get(path), 404, "not_found")
    require_problem(http.delete(f"/v1/jobs/{job_id}"), 404, "not_found")


def test_a_body_too_large_is_refused_however_it_is_sent(world: World) -> None:
    body = json.dumps({"source": world.source, "padding": "x" * 2048}).encode()
    with world.http(max_body_bytes=1024) as http:
        headers = {"Content-Type": "application/json"}
        whole = http.post("/v1/jobs", content=body, headers=headers)
        pieces = http.post(
            "/v1/jobs", content=(body[at : at + 100] for at in range(0, len(body), 100)), headers=headers
        )
        for answer in (whole, pieces):
            assert require_problem(answer, 413, "payload_too_large")["details"] == {"limit_bytes": 1024}


def test_a_body_in_pieces_within_the_limit_is_taken(world: World, http: TestClient) -> None:
    body = json.dumps({"source": world.source}).encode()
    answer = http.post(
        "/v1/jobs",
        content=(body[at : at + 7] for at in range(0, len(body), 7)),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 201


def test_what_is_not_there_is_a_problem_document(shop: Shop) -> None:
    require_problem(shop.http.get("/v2/jobs"), 404, "not_found")
    require_problem(shop.http.get("/v1/jobs/job_0"), 404, "not_found")
    require_problem(shop.http.get("/v1/artifacts/art_0"), 404, "not_found")
    answer = shop.http.delete("/v1/jobs")
    require_problem(answer, 405, "method_not_allowed")
    assert "GET" in answer.headers["allow"]


def test_a_bug_leaks_nothing(
    world: World, http: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(*_: Any, **__: Any) -> None:
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr("service.ledger.views.read_job", explode)
    answer = http.get("/v1/jobs/job_0")
    problem = require_problem(answer, 500, "internal_error")
    assert "hunter2" not in answer.text
    assert problem["details"]["incident"] in caplog.text
    assert "hunter2" in caplog.text


def test_a_store_that_is_away_is_unavailable_for_now(
    world: World, http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = publish_one(world, http)

    def fail(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("The store does not answer.")

    monkeypatch.setattr(world.store, "open", fail)
    assert require_problem(http.get(artifact["url"]), 503, "store_unavailable")["retryable"] is True


# --- events -------------------------------------------------------------------------------------------


def read_stream(text: str) -> list[dict[str, str]]:
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if "event" in fields:
            events.append(fields)
    return events


def test_the_stream_of_an_ended_job_tells_everything_and_ends(world: World, http: TestClient) -> None:
    job_id = submit(http, world)["id"]
    world.play().run_all()
    answer = http.get(f"/v1/jobs/{job_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = read_stream(answer.text)
    assert [int(event["id"]) for event in events[:-1]] == list(range(1, len(events)))
    assert events[-1] == {"event": "end", "data": "{}"}
    assert json.loads(events[-2]["data"])["state"] == "succeeded"
    assert {event["event"] for event in events} == {"job", "step", "variant", "end"}


def test_a_stream_is_taken_up_where_it_broke_off(world: World, http: TestClient) -> None:
    job_id = submit(http, world)["id"]
    world.play().run_all()
    everything = read_stream(http.get(f"/v1/jobs/{job_id}/events").text)
    by_header = read_stream(http.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": "5"}).text)
    by_query = read_stream(http.get(f"/v1/jobs/{job_id}/events?after=5").text)
    both = read_stream(http.get(f"/v1/jobs/{job_id}/events?after=1", headers={"Last-Event-ID": "5"}).text)
    assert by_header == by_query == both == everything[5:]


def test_a_stream_that_cannot_be_is_a_problem_document(world: World, http: TestClient) -> None:
    job_id = submit(http, world)["id"]
    require_problem(http.get("/v1/jobs/job_0/events"), 404, "not_found")
    for number in ("x", "-1", "9" * 30):
        answer = http.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": number})
        require_problem(answer, 422, "invalid_request")


# --- logs ---------------------------------------------------------------------------------------------


def test_logs_are_tails_as_json_and_whole_as_text(world: World, http: TestClient) -> None:
    job_id = submit(http, world, recipes=["none"])["id"]
    play = world.play()
    play.fail(play.claim_kind("convert"), CheckpointInvalid("No."))
    document = http.get(f"/v1/jobs/{job_id}/logs?tail_bytes=14").json()
    schemas.LogList.model_validate(document)
    texts = {log["kind"]: log for log in document["logs"]}
    assert texts["fetch"]["text"] == "\nfetch worked\n"
    assert texts["fetch"]["truncated"] is True
    assert (texts["convert"]["text"], texts["convert"]["truncated"]) == ("it went wrong\n", False)
    assert texts["convert"]["error"]["code"] == "checkpoint_invalid"
    whole = http.get(f"/v1/jobs/{job_id}/logs", headers={"Accept": "text/plain"})
    assert whole.headers["content-type"].startswith("text/plain")
    assert whole.text.count("fetch worked\n") == 2000
    assert "checkpoint_invalid: No.\nit went wrong\n" in whole.text


def test_the_end_of_a_running_log_is_shown_until_the_whole_is_stored(world: World, http: TestClient) -> None:
    job_id = submit(http, world, recipes=["none"])["id"]
    play = world.play()
    claim = play.claim_kind("convert")

    def read(**query: Any) -> dict[str, Any]:
        document = http.get(f"/v1/jobs/{job_id}/logs", params={"kind": "convert", **query}).json()
        schemas.LogList.model_validate(document)
        (log,) = document["logs"]
        return dict(log)

    assert (read()["text"], read()["size_bytes"]) == (None, None)
    claims.report_log(world.database, claim, "half done\n", 5000)
    assert (read()["text"], read()["size_bytes"], read()["truncated"]) == ("half done\n", 5000, True)
    assert read(tail_bytes=5)["text"] == "done\n"
    whole = http.get(f"/v1/jobs/{job_id}/logs", headers={"Accept": "text/plain"}).text
    assert "half done\n" in whole
    play.finish(claim)
    assert read()["text"].endswith("convert worked\n")
    # Whoever still writes after the end shows nothing.
    claims.report_log(world.database, claim, "late", 4)
    assert "late" not in read()["text"]


def test_logs_of_one_kind(world: World, http: TestClient) -> None:
    job_id = submit(http, world)["id"]
    world.play().run_all()
    logs = http.get(f"/v1/jobs/{job_id}/logs?kind=convert").json()["logs"]
    assert [log["kind"] for log in logs] == ["convert"]
    assert "convert" in require_problem(http.get(f"/v1/jobs/{job_id}/logs?kind=konvert"), 422, "unknown_name")["detail"]


# --- artifacts ----------------------------------------------------------------------------------------


def publish_one(world: World, http: TestClient) -> dict[str, Any]:
    job_id = submit(http, world, recipes=["none"], formats=["tflite"])["id"]
    world.play().run_all()
    document = http.get(f"/v1/jobs/{job_id}/artifacts").json()
    schemas.ArtifactList.model_validate(document)
    (artifact,) = document["artifacts"]
    assert artifact["variant"] == "none"
    return dict(artifact)


def test_a_download_is_the_published_bytes(shop: Shop) -> None:
    artifact = shop.artifact
    answer = shop.http.get(artifact["url"])
    assert hashlib.sha256(answer.content).hexdigest() == artifact["sha256"]
    assert answer.headers["etag"] == f'"{artifact["sha256"]}"'
    assert int(answer.headers["content-length"]) == artifact["size_bytes"] == ARTIFACT_BYTES
    assert answer.headers["content-disposition"] == (
        "attachment; filename=\"tiny-none.tflite\"; filename*=UTF-8''tiny-none.tflite"
    )
    assert answer.headers["accept-ranges"] == "bytes"
    head = shop.http.head(artifact["url"])
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == answer.headers["content-length"]


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-9", 5, 10),
        ("bytes=1048570-", 1048570, ARTIFACT_BYTES),
        ("bytes=-3", ARTIFACT_BYTES - 3, ARTIFACT_BYTES),
        ("bytes=-99999999", 0, ARTIFACT_BYTES),
        ("bytes=100-99999999", 100, ARTIFACT_BYTES),
    ],
)
def test_a_range_is_that_part(shop: Shop, asked: str, start: int, end: int) -> None:
    artifact = shop.artifact
    whole = shop.http.get(artifact["url"]).content
    answer = shop.http.get(artifact["url"], headers={"Range": asked, "If-Range": f'"{artifact["sha256"]}"'})
    assert answer.status_code == 206
    assert answer.content == whole[start:end]
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{ARTIFACT_BYTES}"
    assert int(answer.headers["content-length"]) == end - start


@pytest.mark.parametrize(
    "headers",
    [
        {"Range": "bytes=0-1,5-6"},
        {"Range": "lines=1-2"},
        {"Range": "bytes=-"},
        {"Range": "bytes=9-5"},
        {"Range": "bytes=0-1", "If-Range": '"another"'},
    ],
)
def test_a_range_that_is_not_served_is_the_whole(shop: Shop, headers: dict[str, str]) -> None:
    answer = shop.http.get(shop.artifact["url"], headers=headers)
    assert (answer.status_code, len(answer.content)) == (200, ARTIFACT_BYTES)


@pytest.mark.parametrize("asked", [f"bytes={ARTIFACT_BYTES}-", "bytes=-0", "bytes=99999999-"])
def test_a_range_beyond_the_end_is_refused(shop: Shop, asked: str) -> None:
    answer = shop.http.get(shop.artifact["url"], headers={"Range": asked})
    require_problem(answer, 416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{ARTIFACT_BYTES}"


def test_a_client_that_holds_the_file_is_told_so(shop: Shop) -> None:
    artifact = shop.artifact
    answer = shop.http.get(artifact["url"], headers={"If-None-Match": f'"x", W/"{artifact["sha256"]}"'})
    assert (answer.status_code, answer.content) == (304, b"")


def test_a_damaged_blob_never_arrives_whole(world: World, http: TestClient) -> None:
    artifact = publish_one(world, http)
    blob = world.settings.data_dir / "store" / blob_key(artifact["sha256"])
    data = bytearray(blob.read_bytes())
    data[7] ^= 1
    blob.write_bytes(bytes(data))
    answer = http.get(artifact["url"])
    assert 0 < len(answer.content) < artifact["size_bytes"] == int(answer.headers["content-length"])


def test_a_missing_blob_is_a_problem_document(world: World, http: TestClient) -> None:
    artifact = publish_one(world, http)
    world.store.delete(blob_key(artifact["sha256"]))
    require_problem(http.get(artifact["url"]), 500, "blob_missing")


def test_a_manifest_is_its_digest(shop: Shop) -> None:
    artifact = shop.artifact
    answer = shop.http.get(artifact["manifest_url"])
    assert hashlib.sha256(answer.content).hexdigest() == artifact["manifest_sha256"]
    assert answer.json()["artifact"]["sha256"] == artifact["sha256"]


# --- health -------------------------------------------------------------------------------------------


def test_ready_needs_a_worker(world: World, http: TestClient) -> None:
    lonely = http.get("/readyz")
    assert (lonely.status_code, lonely.json()["ready"]) == (503, False)
    assert "No worker" in lonely.json()["checks"]["workers"]["message"]
    world.play()
    ready = http.get("/readyz")
    schemas.Readiness.model_validate(ready.json())
    assert (ready.status_code, ready.json()["ready"]) == (200, True)
    assert ready.json()["workers"][0]["isolation"] == {"isolation": "strong"}


def test_ready_says_what_is_away(world: World, http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    world.play()

    def lose_store() -> None:
        raise StoreUnavailable("The folder is gone.")

    def lose_database(*_: Any) -> None:
        raise OperationalError("SELECT secret", {}, Exception("at 10.0.0.7"))

    monkeypatch.setattr(world.store, "check", lose_store)
    monkeypatch.setattr("service.api.health.ping", lose_database)
    answer = http.get("/readyz")
    checks = answer.json()["checks"]
    assert answer.status_code == 503
    assert checks["store"] == {"ok": False, "message": "The folder is gone."}
    assert checks["database"]["ok"] is False
    assert "10.0.0.7" not in answer.text
    assert checks["workers"]["ok"] is True


# --- the description ----------------------------------------------------------------------------------


def test_the_openapi_document_describes_every_operation(shop: Shop) -> None:
    document = shop.http.get("/openapi.json").json()
    operations = {
        f"{method} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert {"post /v1/jobs", "get /v1/jobs/{job_id}/events", "get /v1/artifacts/{artifact_id}"} <= operations.keys()
    assert len({operation["operationId"] for operation in operations.values()}) == len(operations)
    for name, operation in operations.items():
        assert operation["summary"], name
        assert operation["description"], name
        for status, answer in operation["responses"].items():
            assert answer["description"], (name, status)
            if int(status) >= 400 and "readyz" not in name:
                assert answer["content"]["application/problem+json"]["schema"] == {
                    "$ref": "#/components/schemas/Problem"
                }
    examples = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    for example in examples.values():
        assert set(example["value"]) <= set(document["components"]["schemas"]["JobRequest"]["properties"])
    assert document["components"]["securitySchemes"]["api_key"]["scheme"] == "bearer"
