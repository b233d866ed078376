"""Tokens of tenants: sealed at rest, and opened for a fetch of their own Hub sources alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from starlette.testclient import TestClient
from typer.testing import CliRunner

from service.api import schemas
from service.cli import app
from service.errors import InvalidSettings
from service.ledger import access, copy, tokens
from service.ledger.database import Database
from service.ledger.tables import SourceToken
from service.sealing import Seal, make_sealing_key
from service.settings import load_settings
from service.storage.folder import FolderStore
from tests.api_world import World
from tests.ledger_play import TOOLCHAIN, Play
from tests.unit.workers.test_runner import PlayedSandbox, ended
from workers.process import identify_host
from workers.runner import Runner

TOKEN = "hf_canaryinacoalmine"
HUB = {"kind": "hub", "repo": "kilns/private"}


@pytest.fixture
def key() -> str:
    return make_sealing_key()


@pytest.fixture
def tenants(database: Database) -> Database:
    for tenant in ("default", "team", "other"):
        access.ensure_tenant(database, tenant)
    return database


def dump(database: Database, folder: Path) -> str:
    with (folder / "dump").open("w") as stream:
        copy.write_rows(database, stream)
    return (folder / "dump").read_text()


def test_a_token_is_sealed_for_its_tenant(tenants: Database, tmp_path: Path, key: str) -> None:
    seal = Seal([key])
    tokens.set_token(tenants, seal, "team", "hub", TOKEN)
    assert tokens.find_token(tenants, seal, "team", "hub") == TOKEN
    assert tokens.find_token(tenants, seal, "other", "hub") is None
    assert TOKEN not in dump(tenants, tmp_path)
    # A row that is given to another tenant does not open.
    tenants.write(lambda tx: tx.connection.execute(update(SourceToken).values(tenant_id="other")))
    with pytest.raises(InvalidSettings):
        tokens.find_token(tenants, seal, "other", "hub")


def test_keys_are_changed_without_losing_tokens(tenants: Database) -> None:
    old, new = make_sealing_key(), make_sealing_key()
    tokens.set_token(tenants, Seal([old]), "team", "hub", TOKEN)
    assert tokens.find_token(tenants, Seal([new, old]), "team", "hub") == TOKEN
    with pytest.raises(InvalidSettings, match="EDGEKILN_TOKEN_KEYS"):
        tokens.find_token(tenants, Seal([new]), "team", "hub")
    assert tokens.reseal_tokens(tenants, Seal([new, old])) == (1, [])
    assert tokens.find_token(tenants, Seal([new]), "team", "hub") == TOKEN
    with pytest.raises(InvalidSettings):
        tokens.find_token(tenants, Seal([old]), "team", "hub")


def test_a_token_whose_key_is_lost_keeps_no_other_from_the_new_one(tenants: Database) -> None:
    gone, old, new = (make_sealing_key() for _ in range(3))
    for tenant, key in (("default", old), ("other", gone), ("team", old)):
        tokens.set_token(tenants, Seal([key]), tenant, "hub", TOKEN)
    assert tokens.reseal_tokens(tenants, Seal([new, old])) == (2, [{"tenant": "other", "kind": "hub"}])
    assert tokens.find_token(tenants, Seal([new]), "team", "hub") == TOKEN
    assert tokens.find_token(tenants, Seal([gone]), "other", "hub") == TOKEN, "it stays as it was"
    with pytest.raises(InvalidSettings):
        tokens.reseal_tokens(tenants, Seal([]))


def test_without_a_key_nothing_is_stored(tenants: Database) -> None:
    with pytest.raises(InvalidSettings, match="edgekiln tokens key"):
        tokens.set_token(tenants, Seal([]), "team", "hub", TOKEN)
    assert tokens.list_tokens(tenants, "team") == []
    assert tokens.find_token(tenants, Seal([]), "team", "hub") is None


def test_a_bad_key_is_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKILN_TOKEN_KEYS", "nearly-a-key")
    with pytest.raises(InvalidSettings, match="EDGEKILN_TOKEN_KEYS") as refused:
        load_settings()
    assert "nearly" not in str(refused.value)


# --- who gets it -----------------------------------------------------------------------------------


def find_credentials(database: Database, folder: Path, tenant: str, source: dict[str, str], **settings: Any) -> Any:
    """Return the credential that a child of `resolve` is given, or the step's error."""
    given: list[str | None] = []

    def act(credential: str | None, step_dir: Path, **_: Any) -> Any:
        given.append(credential)
        return ended(step_dir)

    play = Play(database, tenant, identify_host())
    job_id = play.submit(source=source)
    loaded = load_settings({"data_dir": folder, "hub_token": "hf_operator", **settings})
    store = FolderStore(folder / "store")
    Runner(loaded, database, store, PlayedSandbox(act), play.worker_id, TOOLCHAIN, folder / "work").run_next("fetch")
    step = next(step for step in play.job(job_id)["steps"] if step["kind"] == "resolve")
    return given[0] if given else step["error"]["code"]


@pytest.mark.parametrize(
    ("tenant", "kind", "expected"),
    [
        ("team", "hub", TOKEN),
        ("other", "hub", None),
        ("default", "hub", "hf_operator"),
        ("team", "folder", None),
        ("default", "folder", None),
    ],
)
def test_a_fetch_gets_its_own_tenant_s_token_and_no_other(
    sqlite_ledger_url: str, tmp_path: Path, key: str, tenant: str, kind: str, expected: str | None
) -> None:
    database = Database(sqlite_ledger_url)
    access.ensure_tenant(database, "team")
    tokens.set_token(database, Seal([key]), "team", "hub", TOKEN)
    source = HUB if kind == "hub" else {"kind": "folder", "path": "/models/tiny"}
    assert find_credentials(database, tmp_path, tenant, source, token_keys=(key,)) == expected
    database.close()


def test_a_token_that_does_not_open_is_no_reason_to_take_the_operator_s(
    sqlite_ledger_url: str, tmp_path: Path, key: str
) -> None:
    database = Database(sqlite_ledger_url)
    access.ensure_tenant(database, "default")
    tokens.set_token(database, Seal([key]), "default", "hub", TOKEN)
    assert find_credentials(database, tmp_path, "default", HUB) == "invalid_settings"
    database.close()


# --- REST and the command --------------------------------------------------------------------------


@pytest.fixture
def sealed(world: World, key: str) -> Iterator[TestClient]:
    with world.http(token_keys=(key,)) as http:
        yield http


def test_tokens_are_written_and_never_shown(world: World, sealed: TestClient) -> None:
    stored = sealed.put("/v1/tokens/hub", json={"token": TOKEN})
    listed = sealed.get("/v1/tokens")
    assert stored.json() == listed.json()
    (shown,) = schemas.TokenList.model_validate(listed.json()).tokens
    assert shown.fingerprint.startswith("sha256:")
    assert TOKEN not in stored.text + listed.text
    rows = world.database.read(lambda connection: connection.execute(select(SourceToken.__table__)).all())
    assert TOKEN not in str(rows)
    assert sealed.delete("/v1/tokens/hub").status_code == 204
    assert sealed.delete("/v1/tokens/hub").status_code == 404
    assert sealed.get("/v1/tokens").json() == {"tokens": []}


@pytest.mark.parametrize(
    "body", [{}, {"token": ""}, {"token": f"{TOKEN} \n"}, {"token": TOKEN * 99}, {"tokens": TOKEN}]
)
def test_what_is_no_token_is_refused_without_being_repeated(sealed: TestClient, body: dict[str, str]) -> None:
    answer = sealed.put("/v1/tokens/hub", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert TOKEN not in answer.text


def test_a_kind_without_tokens_is_named(sealed: TestClient) -> None:
    answer = sealed.put("/v1/tokens/hubb", json={"token": TOKEN})
    assert (answer.status_code, answer.json()["code"]) == (422, "unknown_name")


def test_the_command_reads_the_token_from_standard_input(
    world: World, key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runner = CliRunner()
    with world.server(token_keys=(key,)) as url:
        monkeypatch.setenv("EDGEKILN_URL", url)
        stored = runner.invoke(app, ["tokens", "set", "--json"], input=f"{TOKEN}\n")
        assert stored.exit_code == 0, stored.stderr
        assert TOKEN not in stored.output
        assert json.loads(runner.invoke(app, ["tokens", "list", "--json"]).stdout) == [json.loads(stored.stdout)]
        assert "sha256:" in runner.invoke(app, ["tokens", "list"]).stdout
        # The operator changes the key.
        new = runner.invoke(app, ["tokens", "key"]).stdout.strip()
        monkeypatch.setenv("EDGEKILN_TOKEN_KEYS", f"{new}:{key}")
        resealed = runner.invoke(app, ["tokens", "reseal", "--data-dir", str(world.settings.data_dir), "--json"])
        assert json.loads(resealed.stdout) == {"resealed": 1, "lost": []}
        assert tokens.find_token(world.database, Seal([new]), "default", "hub") == TOKEN
        monkeypatch.setenv("EDGEKILN_TOKEN_KEYS", key)
        lost = runner.invoke(app, ["tokens", "reseal", "--data-dir", str(world.settings.data_dir), "--json"])
        assert (lost.exit_code, json.loads(lost.stdout)["lost"]) == (1, [{"tenant": "default", "kind": "hub"}])
        assert "tenant default" in lost.stderr
        assert runner.invoke(app, ["tokens", "remove"]).exit_code == 0
        assert runner.invoke(app, ["tokens", "set"], input="\n").exit_code == 2
