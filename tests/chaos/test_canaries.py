"""Real jobs with a canary in every secret: none is found in logs, ledger, broker, store, children or answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from sqlalchemy.engine import make_url

from service.ledger import access
from service.ledger.access import Scope
from service.sealing import make_sealing_key
from service.settings import Settings
from tests.canaries import (
    Eavesdropper,
    Leaks,
    Watcher,
    make_canary,
    merge,
    search,
    search_files,
    search_ledger,
    search_redis,
    tell,
)
from tests.chaos.conftest import Fire
from tests.chaos.test_distributed import copy_ledger
from tests.hub_server import HubServer, run_hub
from tests.kiln import Kiln
from tests.services import redis_url
from tests.unit.service.test_signing import write_keys

REPO = "kilns/private"
#: Processes that are looked into at the least, and jobs that bring about some at the most.
_LEAST_SEEN, _MOST_JOBS = 3, 100


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[HubServer]:
    with run_hub() as server:
        yield server


@pytest.fixture
def guarded_redis(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[redis.Redis, str]]:
    """Yield a Redis of our own, and a password that it demands from now on."""
    monkeypatch.delenv("EDGEKILN_TEST_REDIS_URL", raising=False)
    password = make_canary("redis")
    with redis_url() as url, redis.Redis.from_url(url) as server:
        server.config_set("requirepass", password)
        yield redis.Redis.from_url(url, password=password), url.replace("://", f"://:{password}@")


def ask(url: str, canaries: dict[str, str], job: dict[str, Any]) -> Leaks:
    """Return what the API's answers tell, good ones and bad ones."""
    good = {"Authorization": f"Bearer {canaries['api key']}"}
    bad = {"Authorization": f"Bearer {canaries['wrong key']}"}
    job_id = job["id"]
    artifacts = [artifact for variant in job["variants"] for artifact in variant["artifacts"]]
    query = {"token": canaries["query"]}
    with httpx.Client(base_url=url, trust_env=False) as http:
        answers = [
            *(
                http.get(path, headers=headers, params=query)
                for headers in (good, bad, {"Authorization": f"Basic {canaries['wrong key']}"})
                for path in (f"/v1/jobs/{job_id}", "/v1/keys", "/v1/tokens", "/v1/workers", "/readyz", "/v1/nowhere")
            ),
            http.get(f"/v1/jobs/{job_id}/events", headers=good),
            http.get(f"/v1/jobs/{job_id}/logs", headers={**good, "Accept": "text/plain"}),
            http.put("/v1/tokens/hub", headers=good, json={"token": f"{canaries['hub token']} "}),
            http.put("/v1/tokens/nowhere", headers=good, json={"token": canaries["hub token"]}),
            *(http.get(artifact["manifest_url"], headers=good) for artifact in artifacts),
        ]
    assert {answer.status_code for answer in answers} >= {200, 401, 404, 422}
    return merge(search(canaries, str(answer.url.path), tell(answer)) for answer in answers)


@pytest.mark.parametrize("profile", ["embedded", "distributed"])
def test_no_secret_leaves_its_place(
    profile: str,
    fire: Fire,
    converted: Path,
    checkpoint: Path,
    hub: HubServer,
    guarded_redis: tuple[redis.Redis, str],
    postgres_ledger_url: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    # 1. a canary in every secret
    server, broker_url = guarded_redis
    canaries = {
        "hub token": make_canary("hub"),
        "operator's hub token": make_canary("operator"),
        "sealing key": make_sealing_key(),
        "store secret": make_canary("store"),
        "source bucket's secret": make_canary("bucket"),
        "wrong key": make_canary("key"),
        "query": make_canary("query"),
    }
    # The key stands outside what is searched, as an operator's would; its body is looked for.
    keys = tmp_path_factory.mktemp("keys")
    private, public = write_keys(keys)
    canaries["signing key"] = private.read_text().splitlines()[1]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", canaries["store secret"])
    monkeypatch.setenv("HF_TOKEN", canaries["operator's hub token"])
    # Control: one of the few variables that children do get.
    planted = make_canary("planted")
    monkeypatch.setenv("PYTHONNOUSERSITE", planted)
    settings = {
        "hub_endpoint": hub.endpoint,
        "hub_token": canaries["operator's hub token"],
        "token_keys": canaries["sealing key"],
        "source_s3_access_key_id": "reader",
        "source_s3_secret_access_key": canaries["source bucket's secret"],
        "signing_key_file": str(private),
    }
    if profile == "distributed":
        canaries["redis password"] = str(server.connection_pool.connection_kwargs["password"])
        canaries["database password"] = make_canary("database")
        # The server trusts whoever comes; what the client is told stands in its settings all the same.
        url = make_url(postgres_ledger_url).set(password=canaries["database password"])
        copy_ledger(f"sqlite:///{converted / 'data' / 'ledger.db'}", postgres_ledger_url)
        (converted / "data" / "ledger.db").unlink()
        settings |= {"database_url": url.render_as_string(hide_password=False), "broker_url": broker_url}
        # A setting that is a secret and is not told to anybody by its `repr` has its canary here.
        assert {name for name, field in Settings.model_fields.items() if not field.repr} <= settings.keys()
    hub.add_folder(REPO, checkpoint, tokens={canaries["hub token"]})

    # 2. a real job on a private repository, and one that fails
    kiln = fire(**settings)
    key = access.create_key(kiln.database, access.DEFAULT_TENANT, "canary", scopes=Scope)
    canaries["api key"] = key.secret
    kiln.client.set_token(canaries["hub token"])
    with Eavesdropper(server) as redis_commands, Watcher({**canaries, "planted": planted}, kiln) as watcher:
        request = {"source": {"kind": "hub", "repo": REPO}, "recipes": ["dynamic_int8"], "formats": ["litertlm"]}
        job = kiln.finished(kiln.client.submit(request)["id"])
        assert job["state"] == "succeeded", job
        missing = {**request, "source": {"kind": "hub", "repo": "kilns/missing"}}
        assert kiln.finished(kiln.client.submit(missing)["id"])["state"] == "failed"
        for _ in range(_MOST_JOBS):
            # Children live for a moment only: they go on coming until some were looked into.
            if len(watcher.seen) > _LEAST_SEEN and watcher.leaks:
                break
            kiln.finished(kiln.client.submit(missing)["id"])
        # 3. answers, while the server's log is written
        leaks = [ask(kiln.client.url, canaries, job)]
    assert watcher.leaks == {"environ of a child": {"planted"}}
    assert len(watcher.seen) > _LEAST_SEEN
    assert any(request.authorization == f"Bearer {canaries['hub token']}" for request in hub.requests), "it was used"

    assert kiln.client.download(job["id"], kiln.folder / "out", verify_key=public), "it was signed"

    # 4. the search
    def look() -> Leaks:
        return merge(
            [
                search_files(canaries, kiln.folder),
                search_ledger(canaries, kiln.database, kiln.folder.with_suffix(".dump")),
                search_redis(canaries, server),
                search(canaries, "redis commands", "\n".join(redis_commands.heard)),
            ]
        )

    assert merge([*leaks, look()]) == {}
    assert (profile == "distributed") == any("poke" in text or "step" in text for text in redis_commands.heard)

    # Control: what is planted is found, wherever it is.
    plant(kiln, server, canaries)
    assert look().keys() >= {"data/logs/api.log", "data/store/planted", "ledger"}
    assert any(place.startswith("redis key") for place in look())


def plant(kiln: Kiln, server: redis.Redis, canaries: dict[str, str]) -> None:
    """Put a canary where none may be."""
    with (kiln.data_dir / "logs" / "api.log").open("a") as stream:
        stream.write(canaries["query"])
    (kiln.data_dir / "store" / "planted").write_text(f"a manifest with {canaries['hub token']}")
    access.create_key(kiln.database, access.DEFAULT_TENANT, canaries["sealing key"])
    server.set("planted", canaries["store secret"])
