"""No tenant learns anything of another's: every route and method of the app, and what no route shows.

A route that is added later belongs into one of the tables below; until then `test_every_route_has_a_case` fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fastapi import APIRouter
from starlette.testclient import TestClient

from service.api import app as api_app
from service.devices import TOOLS
from service.ledger import access
from service.ledger.access import Scope
from service.sealing import make_sealing_key
from service.storage import blob_key
from service.storage.folder import FolderStore
from tests.api_routes import list_operations, walk_routes
from tests.api_world import World
from tests.measured_play import MeasuredPlay, measured

OWNER, STRANGER = "obsidian", "stranger"
#: Stands in everything that the owner names.
MARK = "zirconium"
TEXT = f"the {MARK} text of the owner\n".encode() * 40
#: Who has an id but no tenant: operators see the fleet whole (decision 16), anybody else nothing of it.
FLEET = (
    *("/v1/workers", "/v1/workers/{worker_id}/drain", "/v1/workers/{worker_id}/resume"),
    *("/v1/devices/{device_id}/tags", "/v1/devices/{device_id}/release"),
)
#: What an id in a path must look like; the owner's is one that is there.
ABSENT = {
    "job_id": "job_" + "0" * 16,
    "artifact_id": "art_0",
    "schedule_id": "sch_0",
    "key_id": "key_0",
    "upload_id": "upl_0",
}
#: What stands in a path below an id.
BELOW = {"digest": "f" * 64}
#: What routes with an id need beyond it.
BODIES: dict[str, Any] = {"POST /v1/artifacts/{artifact_id}/benchmarks": {"devices": ["any"]}}


@dataclass
class Estate:
    """What the owner has, and how both tenants are served."""

    world: World
    owner: TestClient
    stranger: TestClient
    #: Name of a path's parameter -> the owner's id.
    ids: dict[str, str]
    digest: str
    request: dict[str, Any]

    def find_traces(self, text: str) -> list[str]:
        """Return what a text tells of the owner."""
        return [trace for trace in (MARK, OWNER, self.digest, *self.ids.values()) if trace in text]


@pytest.fixture
def estate(world: World) -> Iterator[Estate]:
    (world.models / MARK).mkdir()
    request = {"source": {"kind": "folder", "path": str(world.models / MARK)}, "recipes": ["none"]}
    secrets = {}
    for tenant in (OWNER, STRANGER):
        access.ensure_tenant(world.database, tenant)
        secrets[tenant] = access.create_key(world.database, tenant, f"{tenant}'s", scopes=Scope).secret
    app = world.app(token_keys=(make_sealing_key(),))
    clients = {
        tenant: TestClient(
            app,
            base_url="http://127.0.0.1",
            headers={"Authorization": f"Bearer {secret}"},
            raise_server_exceptions=False,
        )
        for tenant, secret in secrets.items()
    }
    owner = clients[OWNER]
    job_id = owner.post("/v1/jobs", json=request, headers={"Idempotency-Key": f"{MARK}-1"}).json()["id"]
    world.play(OWNER).run_all()
    upload = owner.post("/v1/uploads", content=TEXT, params={"name": f"{MARK}.txt"}).json()
    schedule = owner.post("/v1/schedules", json={"name": f"{MARK}, nightly", "every_s": 3600, "job": request}).json()
    owner.put("/v1/tokens/hub", json={"token": f"hf_{MARK}"})
    ids = {
        "job_id": job_id,
        "artifact_id": owner.get(f"/v1/jobs/{job_id}/artifacts").json()["artifacts"][0]["id"],
        "schedule_id": schedule["id"],
        "key_id": owner.post("/v1/keys", json={"name": f"{MARK} key"}).json()["id"],
        "upload_id": begin_an_upload(owner).rpartition("/")[2],
        "measurement_id": measure(world, OWNER),
    }
    yield Estate(world, owner, clients[STRANGER], ids, upload["sha256"], request)
    for client in clients.values():
        client.close()


def measure(world: World, tenant_id: str) -> str:
    """Have something measured, by one who names it as the owner does, and return the measurement's id."""
    play = MeasuredPlay(world, tenant_id)
    name = f"{MARK}, measured" if tenant_id == OWNER else "measured"
    play.source = {"kind": "folder", "path": str(world.models / name)}
    job = play.job(play.measure(measured()))
    return str(next(step["id"] for step in job["steps"] if step["kind"] == "benchmark"))


def begin_an_upload(client: TestClient) -> str:
    answer = client.post("/v1/uploads/resumable", headers={"Tus-Resumable": "1.0.0", "Upload-Length": "10"})
    assert answer.status_code == 201, answer.text
    return str(answer.headers["Location"])


# --- routes without an id of the ledger ------------------------------------------------------------


def look(path: str) -> Callable[[Estate], None]:
    """A list, or a page for everybody: it shows nothing of the owner, and pages from no place of the owner's."""

    def check(estate: Estate) -> None:
        answer = estate.stranger.get(path)
        assert answer.status_code in (200, 503), path
        assert estate.find_traces(answer.text) == [], path

    return check


def submit_a_job(estate: Estate) -> None:
    """The owner's idempotency key is free for others; the owner's uploads are not there for others."""
    own = estate.stranger.post("/v1/jobs", json=estate.request, headers={"Idempotency-Key": f"{MARK}-1"})
    assert (own.status_code, own.json()["id"] == estate.ids["job_id"]) == (201, False)
    other = {**estate.request, "recipes": ["dynamic_int8"]}
    again = estate.owner.post("/v1/jobs", json=other, headers={"Idempotency-Key": f"{MARK}-1"})
    assert again.json()["code"] == "idempotency_mismatch", "control: for the owner it is taken"
    for field in ("evaluation", "perplexity_text"):

        def ask_with(digest: str, field: str = field) -> dict[str, Any]:
            return {**other, field: digest}

        same(estate.stranger, "POST", "/v1/jobs", estate.digest, "f" * 64, ask_with)

    def ask_for_checkpoint(digest: str) -> dict[str, Any]:
        names = ("config.json", "model.safetensors", "tokenizer.json")
        return {**other, "source": {"kind": "upload", "files": dict.fromkeys(names, digest)}}

    same(estate.stranger, "POST", "/v1/jobs", estate.digest, "f" * 64, ask_for_checkpoint)
    assert estate.owner.post("/v1/jobs", json={**other, "perplexity_text": estate.digest}).status_code == 201


def add_a_schedule(estate: Estate) -> None:
    """The owner's names are free for others."""
    schedule = {"name": f"{MARK}, nightly", "every_s": 3600, "job": estate.request}
    assert estate.owner.post("/v1/schedules", json=schedule).status_code == 409, "control"
    assert estate.stranger.post("/v1/schedules", json=schedule).status_code == 201
    named = {**schedule, "name": "another"}

    def ask_with(digest: str) -> dict[str, Any]:
        return {**named, "job": {**estate.request, "perplexity_text": digest}}

    same(estate.stranger, "POST", "/v1/schedules", estate.digest, "f" * 64, ask_with)


def upload_a_file(estate: Estate) -> None:
    """The owner's bytes are new to others."""
    assert estate.owner.post("/v1/uploads", content=TEXT).status_code == 200, "control"
    theirs = estate.stranger.post("/v1/uploads", content=TEXT)
    assert theirs.status_code == 201
    assert theirs.json()["name"] is None


def upload_in_pieces(estate: Estate) -> None:
    """Others' unfinished uploads are their own."""
    path = begin_an_upload(estate.stranger)
    assert estate.stranger.get(path).status_code == 200
    assert path.rpartition("/")[2] != estate.ids["upload_id"]


def make_a_key(estate: Estate) -> None:
    """A key made by the stranger opens the stranger's work."""
    key = estate.stranger.post("/v1/keys", json={"name": "mine"}).json()["key"]
    seen = estate.stranger.get("/v1/jobs", headers={"Authorization": f"Bearer {key}"})
    assert seen.status_code == 200
    assert estate.ids["job_id"] not in seen.text


def register_a_tool(estate: Estate) -> None:
    """The owner's uploads are no tools of others."""

    def ask_with(digest: str) -> dict[str, Any]:
        return {"name": tool, "version": "1", "abi": "arm64-v8a", "files": {tool: digest}}

    tool = next(iter(TOOLS.values()))
    same(estate.stranger, "POST", "/v1/tools", estate.digest, "f" * 64, ask_with)


def compare_measurements(estate: Estate) -> None:
    """The owner's measurements, on either side, are as if they were not there."""
    own = estate.ids["measurement_id"]
    found = estate.owner.get("/v1/measurements/difference", params={"baseline": own, "candidate": own})
    assert found.status_code == 200, f"control: {found.text}"
    theirs = measure(estate.world, STRANGER)
    for query in (f"baseline={{}}&candidate={theirs}", f"baseline={theirs}&candidate={{}}"):
        same(estate.stranger, "GET", f"/v1/measurements/difference?{query}", own, "step_0", status=404)


def set_a_token(estate: Estate) -> None:
    """Tokens are each tenant's own."""
    before = estate.owner.get("/v1/tokens").json()
    assert estate.stranger.put("/v1/tokens/hub", json={"token": "hf_other"}).status_code == 200
    assert estate.stranger.delete("/v1/tokens/hub").status_code == 204
    assert estate.owner.get("/v1/tokens").json() == before


def remove_a_token(estate: Estate) -> None:
    """The owner's token is not there for others."""
    same(estate.stranger, "DELETE", "/v1/tokens/{}", "hub", "hub")
    assert estate.owner.get("/v1/tokens").json()["tokens"]


WITHOUT_IDS: dict[tuple[str, str], Callable[[Estate], None]] = {
    **{
        ("GET", path): look(path)
        for path in (
            *("/v1/jobs", "/v1/uploads", "/v1/schedules", "/v1/keys", "/v1/tokens", "/v1/uploads/resumable"),
            *("/v1/measurements", "/v1/devices", "/v1/tools", "/v1/recipes", "/healthz", "/readyz", "/openapi.json"),
        )
    },
    ("HEAD", "/openapi.json"): look("/openapi.json"),
    ("POST", "/v1/jobs"): submit_a_job,
    ("POST", "/v1/schedules"): add_a_schedule,
    ("POST", "/v1/tools"): register_a_tool,
    ("GET", "/v1/measurements/difference"): compare_measurements,
    # From here on the stranger has the owner's bytes too.
    ("POST", "/v1/uploads"): upload_a_file,
    ("POST", "/v1/uploads/resumable"): upload_in_pieces,
    ("POST", "/v1/keys"): make_a_key,
    ("PUT", "/v1/tokens/{kind}"): set_a_token,
    ("DELETE", "/v1/tokens/{kind}"): remove_a_token,
}


def same(
    client: TestClient,
    method: str,
    path: str,
    theirs: str,
    absent: str,
    make_body: Callable[[str], Any] = lambda _: None,
    status: int | None = None,
) -> None:
    """Assert that a thing of another tenant and one that is not there get the same answer, but for the name."""
    answers = [
        client.request(method, path.format(name), json=make_body(name), follow_redirects=False)
        for name in (theirs, absent)
    ]
    found, missing = (describe(answer, name) for answer, name in zip(answers, (theirs, absent), strict=True))
    assert found == missing, f"{method} {path}"
    assert answers[0].status_code == (status or answers[0].status_code), f"{method} {path}: {answers[0].text}"
    assert answers[0].status_code in (404, 422), f"{method} {path}: {answers[0].text}"


def describe(answer: httpx.Response, name: str) -> tuple[int, str, dict[str, str]]:
    """Return all that an answer says, with the name left out."""
    headers = {key: value for key, value in answer.headers.items() if key not in ("date", "content-length")}
    return answer.status_code, answer.text.replace(name, "NAME"), headers


# --- every route -----------------------------------------------------------------------------------


def find_uncovered(world: World) -> set[tuple[str, str]]:
    """Return the operations of the app that no table above names."""
    operations = set(list_operations(world.app()))
    covered = {
        (method, path)
        for method, path in operations
        if len(parameters(path) & {*ABSENT}) == 1 and parameters(path) <= {*ABSENT, *BELOW}
    }
    return operations - covered - {*WITHOUT_IDS} - {(method, path) for method, path in operations if path in FLEET}


def parameters(path: str) -> set[str]:
    return set(re.findall(r"{(\w+)}", path))


def test_every_route_has_a_case(world: World) -> None:
    assert find_uncovered(world) == set()
    assert WITHOUT_IDS.keys() <= {*list_operations(world.app())}, "a case of a route that is gone"


def test_a_route_without_a_case_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control."""
    router = APIRouter()
    router.add_api_route("/v1/pots/{pot_id}", lambda: None, methods=["PATCH"])
    router.add_api_route("/v1/pots", lambda: None, methods=["GET"])
    monkeypatch.setattr(api_app, "ROUTERS", (*api_app.ROUTERS, router))
    assert find_uncovered(world) == {("PATCH", "/v1/pots/{pot_id}"), ("GET", "/v1/pots")}


def test_what_is_another_tenant_s_is_as_if_it_were_not(estate: Estate) -> None:
    operations = [each for each in list_operations(estate.world.app()) if parameters(each[1]) & {*ABSENT}]
    assert len(operations) > 15
    templates = {path: re.sub(r"{(\w+)}", lambda found: BELOW.get(found[1], "{}"), path) for _, path in operations}
    before = estate.owner.get("/v1/jobs").json()
    for method, path in operations:
        (parameter,) = parameters(path) & {*ABSENT}
        body = BODIES.get(f"{method} {path}")
        for absent in (ABSENT[parameter], "x"):
            same(
                estate.stranger, method, templates[path], estate.ids[parameter], absent, lambda _, body=body: body, 404
            )  # type: ignore[misc]
    assert estate.owner.get("/v1/jobs").json() == before
    # Control: for the owner each of them is there; what changes most comes last.
    for method, path in sorted(operations, key=lambda each: ("GET HEAD POST PUT PATCH DELETE".index(each[0]), each[1])):
        (parameter,) = parameters(path) & {*ABSENT}
        answer = estate.owner.request(method, templates[path].format(estate.ids[parameter]))
        # The artifact is there, but was neither signed nor measured.
        lacks_part = any(words in answer.text for words in ("without a signature", "There is no measurement"))
        assert answer.status_code != 404 or lacks_part, f"{method} {path}: {answer.text}"


def test_what_has_no_id_tells_nothing(estate: Estate) -> None:
    for check in WITHOUT_IDS.values():
        check(estate)
    # Figures of all tenants stand on a port of their own.
    assert estate.stranger.get("/metrics").status_code == 404


def test_pages_start_from_no_place_of_another_tenant_s(estate: Estate) -> None:
    """Whatever list takes `before`: the owner's last one is as good as none."""
    places = {
        "/v1/jobs": (estate.ids["job_id"], ABSENT["job_id"]),
        "/v1/schedules": (estate.ids["schedule_id"], ABSENT["schedule_id"]),
        "/v1/uploads": (estate.digest, "f" * 64),
    }
    paged = {
        route.path
        for route in walk_routes(estate.world.app())
        if hasattr(route, "dependant") and "before" in {field.name for field in route.dependant.query_params}
    }
    assert paged == places.keys()
    for path, (theirs, absent) in places.items():
        same(estate.stranger, "GET", f"{path}?before={{}}", theirs, absent, status=404)
        assert estate.owner.get(path, params={"before": theirs}).status_code == 200, "control"


def test_the_fleet_is_nobody_s_but_the_operators(estate: Estate) -> None:
    key = access.create_key(estate.world.database, STRANGER, "no operator's").secret
    headers = {"Authorization": f"Bearer {key}"}
    worker_id = estate.owner.get("/v1/workers").json()["workers"][0]["id"]
    for method, path in list_operations(estate.world.app()):
        if path in FLEET:
            url = re.sub(r"{\w+}", "{}", path)
            theirs, absent = (
                estate.stranger.request(method, url.format(name), headers=headers) for name in (worker_id, "worker_0")
            )
            assert describe(theirs, worker_id) == describe(absent, "worker_0"), path
            assert theirs.status_code == 403


# --- what no route shows ----------------------------------------------------------------------------


def test_work_of_another_tenant_is_never_joined(estate: Estate) -> None:
    first = estate.owner.get(f"/v1/jobs/{estate.ids['job_id']}").json()
    job_id = estate.stranger.post("/v1/jobs", json=estate.request).json()["id"]
    estate.world.play(STRANGER).run_all()
    job = estate.stranger.get(f"/v1/jobs/{job_id}").json()
    assert [step["reused"] for step in job["steps"]] == [False] * len(job["steps"])
    assert {step["key"] for step in job["steps"]} & {step["key"] for step in first["steps"]}, "it is the same work"
    assert not {step["id"] for step in job["steps"]} & {step["id"] for step in first["steps"]}
    assert estate.owner.get(f"/v1/jobs/{estate.ids['job_id']}").json() == first
    # Control: the owner's second job does join the first.
    other = estate.owner.post("/v1/jobs", json=estate.request).json()["id"]
    estate.world.play(OWNER).run_all()
    assert any(step["reused"] for step in estate.owner.get(f"/v1/jobs/{other}").json()["steps"])


def test_an_upload_costs_the_same_whoever_has_the_bytes(estate: Estate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that another tenant has are written as new ones are: how long that takes tells nothing."""
    written: list[bool] = []
    put_file = FolderStore.put_file

    def note(self: FolderStore, *arguments: Any, **options: Any) -> bool:
        written.append(put_file(self, *arguments, **options))
        return written[-1]

    monkeypatch.setattr(FolderStore, "put_file", note)
    assert estate.stranger.post("/v1/uploads", content=b"new to everybody").status_code == 201
    assert estate.stranger.post("/v1/uploads", content=TEXT).status_code == 201
    assert written == [True, True]
    # Control: what a worker stores is not written again.
    source = estate.world.folder / "output"
    source.write_bytes(TEXT)
    assert estate.world.store.put_file(blob_key(estate.digest), source, estate.digest) is False
