"""API keys: scopes, expiry, rotation, last use; by REST, by the command line, and on every route."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter
from sqlalchemy import update
from starlette.testclient import TestClient

from service.api import app as api_app
from service.api import schemas
from service.api.context import find_scopes
from service.api.guards import OPEN_PATHS
from service.client import Client
from service.errors import NotFound, ScopeRequired, Unauthorized
from service.ledger import access
from service.ledger.access import Scope
from service.ledger.clock import now
from service.ledger.database import Database
from service.ledger.tables import ApiKey
from tests.api_routes import list_operations, walk_routes
from tests.api_world import World

Run = Callable[..., Any]

#: Served without a key (`OPEN_PATHS`), or with any.
UNSCOPED = {"/healthz", "/readyz", "/openapi.json"}


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def make_key(world: World, *scopes: Scope, tenant: str = "default", **life: float) -> access.NewKey:
    access.ensure_tenant(world.database, tenant)
    return access.create_key(world.database, tenant, "mine", scopes=scopes or access.DEFAULT_SCOPES, **life)


# --- every route ----------------------------------------------------------------------------------


def find_undeclared(world: World) -> list[str]:
    """Return the routes that do not demand exactly one scope."""
    scopeless = [route for route in walk_routes(world.app()) if route.path not in UNSCOPED]
    return [route.path for route in scopeless if len(find_scopes(route.dependant)) != 1]


def test_every_route_declares_its_scope(world: World) -> None:
    assert find_undeclared(world) == []
    assert UNSCOPED - {"/openapi.json"} == OPEN_PATHS


def test_a_route_without_a_scope_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control."""
    router = APIRouter()
    router.add_api_route("/v1/forgotten", lambda: None, methods=["POST"])
    monkeypatch.setattr(api_app, "ROUTERS", (*api_app.ROUTERS, router))
    assert find_undeclared(world) == ["/v1/forgotten"]


def test_every_route_refuses_a_key_without_its_scope(world: World) -> None:
    keys = {
        scope: make_key(world, *(other for other in Scope if other is not scope), tenant="team").secret
        for scope in Scope
    }
    asked = 0
    with world.http() as http:
        for route in walk_routes(world.app()):
            if route.path in UNSCOPED:
                continue
            (scope,) = find_scopes(route.dependant)
            for method in route.methods:
                answer = http.request(method, re.sub(r"{\w+}", "x", route.path), headers=bearer(keys[scope]))
                assert answer.status_code == 403, (method, route.path)
                if method != "HEAD":
                    code = "operator_required" if scope is Scope.OPERATE else "scope_required"
                    assert answer.json()["code"] == code, (method, route.path)
                asked += 1
    assert asked == len([path for _, path in list_operations(world.app()) if path not in UNSCOPED])


def test_the_page_of_routes_says_each_scope(world: World) -> None:
    page = Path("docs/rest.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\| `(\w+ \S+)` \| (\S+) \|", page, re.MULTILINE))
    for route in walk_routes(world.app()):
        for method in route.methods - {"HEAD"}:
            if route.path != "/openapi.json":
                scope = next(iter(find_scopes(route.dependant)), "-")
                assert stated[f"{method} {route.path}"] == scope, route.path


def test_the_openapi_document_says_each_scope(world: World) -> None:
    document = world.app().openapi()
    assert document["paths"]["/v1/jobs"]["post"]["security"] == [{"api_key": ["write"]}, {}]
    assert document["paths"]["/v1/keys"]["get"]["security"] == [{"api_key": ["operate"]}, {}]
    assert document["paths"]["/healthz"]["get"]["security"] == [{"api_key": []}, {}]


# --- what a key is --------------------------------------------------------------------------------


def test_a_key_is_hashed_and_made_of_32_random_bytes(database: Database) -> None:
    access.ensure_tenant(database, "team")
    keys = [access.create_key(database, "team", "ci") for _ in range(3)]
    assert len({key.secret for key in keys}) == 3
    for key in keys:
        assert re.fullmatch(r"ek_[0-9a-f]{8}_[A-Za-z0-9_-]{43}", key.secret)
        assert access.authenticate(database, key.secret).tenant_id == "team"
    shown = json.dumps(access.list_keys(database, "team"))
    assert not [key for key in keys if key.secret[12:] in shown]


@pytest.mark.parametrize("change", ["last", "prefix", "longer", "empty"])
def test_what_is_nearly_a_key_is_none(database: Database, change: str) -> None:
    access.ensure_tenant(database, "team")
    secret = access.create_key(database, "team", "ci").secret
    other = access.create_key(database, "team", "cd").secret
    forged = {
        "last": secret[:-1] + ("A" if secret[-1] != "A" else "B"),
        "prefix": other[:11] + secret[11:],
        "longer": secret + "A",
        "empty": "",
    }
    with pytest.raises(Unauthorized):
        access.authenticate(database, forged[change])


def test_use_is_noted_once_a_minute(database: Database) -> None:
    access.ensure_tenant(database, "team")
    key = access.create_key(database, "team", "ci")

    def read_use() -> Any:
        return access.read_key(database, "team", key.id)["last_used_at"]

    assert read_use() is None
    access.authenticate(database, key.secret)
    first = read_use()
    assert first is not None
    access.authenticate(database, key.secret)
    assert read_use() == first
    database.write(lambda tx: tx.connection.execute(update(ApiKey).values(last_used_at=now(-61))))
    access.authenticate(database, key.secret)
    assert read_use() >= first


def test_rotation_overlaps_and_the_old_key_ends(database: Database) -> None:
    access.ensure_tenant(database, "team")
    old = access.create_key(database, "team", "ci", lifetime_s=30 * 86400, scopes=[Scope.READ])
    new = access.rotate_key(database, "team", old.id, overlap_s=3600)
    assert access.authenticate(database, old.secret).scopes == {Scope.READ}
    assert access.authenticate(database, new.secret).scopes == {Scope.READ}
    shown = {key["id"]: key for key in access.list_keys(database, "team")}
    assert shown[old.id]["replaced_by"] == new.id
    assert shown[new.id]["name"] == "ci"
    assert shown[old.id]["expires_at"] < shown[new.id]["expires_at"]
    # The overlap is over.
    database.write(
        lambda tx: tx.connection.execute(update(ApiKey).where(ApiKey.id == old.id).values(expires_at=now(-1)))
    )
    with pytest.raises(Unauthorized):
        access.authenticate(database, old.secret)
    assert access.authenticate(database, new.secret)
    with pytest.raises(NotFound):
        access.rotate_key(database, "team", old.id, overlap_s=0)


def test_a_rotation_without_overlap_ends_the_old_key_at_once(database: Database) -> None:
    access.ensure_tenant(database, "team")
    old = access.create_key(database, "team", "ci")
    access.rotate_key(database, "team", old.id, overlap_s=0)
    with pytest.raises(Unauthorized):
        access.authenticate(database, old.secret)


# --- REST and the SDK -----------------------------------------------------------------------------


def test_an_operator_manages_the_keys_of_its_own_tenant(world: World, url: str) -> None:
    other = make_key(world, tenant="other")
    operator = make_key(world, *Scope, tenant="team")
    with Client(url, operator.secret) as kiln:
        made = kiln.create_key("ci", ["read"], expires_days=1)
        schemas.NewKeyDocument.model_validate(made)
        with Client(url, made["key"]) as reader:
            assert list(reader.list()) == []
            with pytest.raises(ScopeRequired):
                reader.cancel("job_0")
        rotated = kiln.rotate_key(made["id"], overlap_hours=0)
        assert rotated["scopes"] == ["read"]
        listed = kiln.keys()
        schemas.KeyList.model_validate({"keys": listed})
        assert {key["id"] for key in listed} == {operator.id, made["id"], rotated["id"]}
        assert not any("key" in key for key in listed)
        kiln.revoke_key(rotated["id"])
        with pytest.raises(NotFound):
            kiln.revoke_key(other.id)
        for secret in (made["key"], rotated["key"]):
            with Client(url, secret) as ended, pytest.raises(Unauthorized):
                list(ended.list())
    assert access.authenticate(world.database, other.secret).tenant_id == "other"


def test_no_key_makes_one_that_may_do_more_than_itself(world: World, http: TestClient) -> None:
    writer = make_key(world, Scope.WRITE, tenant="team")
    headers = bearer(make_key(world, Scope.OPERATE, Scope.READ, tenant="team").secret)
    refused = http.post("/v1/keys", json={"name": "more", "scopes": ["write"]}, headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (403, "scope_required")
    refused = http.post(f"/v1/keys/{writer.id}/rotate", headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (403, "scope_required")
    assert http.post("/v1/keys", json={"name": "same", "scopes": ["read"]}, headers=headers).status_code == 201


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": ""},
        {"name": "x", "scopes": []},
        {"name": "x", "scopes": ["root"]},
        {"name": "x", "expires_days": 0},
    ],
)
def test_a_key_that_cannot_be_is_refused(http: TestClient, body: dict[str, Any]) -> None:
    assert http.post("/v1/keys", json=body).status_code == 422


# --- the command ----------------------------------------------------------------------------------


def test_the_command_makes_rotates_lists_and_revokes(run: Run, tmp_path: Path) -> None:
    ledger = ["--data-dir", str(tmp_path / "own")]
    operator = json.loads(run("keys", "create", "ops", "--operator", "--json", *ledger).stdout)
    assert operator["scopes"] == ["read", "write", "operate"]
    reader = json.loads(run("keys", "create", "ci", "--scope", "read", "--expires-days", "9", "--json", *ledger).stdout)
    rotated = json.loads(run("keys", "rotate", reader["id"], "--overlap-hours", "2", "--json", *ledger).stdout)
    assert (rotated["name"], rotated["scopes"]) == ("ci", ["read"])
    again = run("keys", "rotate", reader["id"], *ledger)
    assert (again.exit_code, again.stderr.partition(":")[0]) == (1, "conflict")
    revoked = json.loads(run("keys", "revoke", operator["id"], "--json", *ledger).stdout)
    assert revoked["revoked_at"]
    listed = {key["id"]: key for key in json.loads(run("keys", "list", "--json", *ledger).stdout)}
    assert listed.keys() == {operator["id"], reader["id"], rotated["id"]}
    assert listed[reader["id"]]["replaced_by"] == rotated["id"]
    table = run("keys", "list", *ledger).stdout
    assert reader["prefix"] in table
    assert reader["key"] not in table
    for wrong in (["--scope", "root"], ["--operator", "--scope", "read"], ["--expires-days", "0"]):
        assert run("keys", "create", "x", *wrong, *ledger).exit_code == 2
