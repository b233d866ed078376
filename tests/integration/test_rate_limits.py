"""Too many requests: of a key, of a tenant, and wrong keys from an address."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from service.api.__main__ import make_config
from service.client import Client
from service.errors import RateLimited
from service.ledger import access
from tests.api_world import World
from tests.services import free_port, redis_url


def make_key(world: World, tenant: str = "team") -> dict[str, str]:
    access.ensure_tenant(world.database, tenant)
    return {"Authorization": f"Bearer {access.create_key(world.database, tenant, 'ci').secret}"}


@contextmanager
def http_from(world: World, address: str, app: Any = None, **settings: Any) -> Iterator[TestClient]:
    """Yield a client whose connections come from an address."""
    served = app or world.app(**settings)
    with TestClient(served, base_url="http://127.0.0.1", client=(address, 50_000)) as client:
        yield client


def ask(http: TestClient, headers: dict[str, str], times: int) -> list[int]:
    return [http.get("/v1/recipes", headers=headers).status_code for _ in range(times)]


def test_a_key_may_ask_so_often_a_minute(world: World) -> None:
    first, second = make_key(world), make_key(world)
    with world.http(key_requests_per_min=5) as http:
        assert ask(http, first, 6) == [200] * 5 + [429]
        refused = http.get("/v1/recipes", headers=first)
        problem = refused.json()
        assert (problem["code"], problem["retryable"]) == ("rate_limited", True)
        assert 1 <= int(refused.headers["Retry-After"]) <= 61
        assert problem["details"]["retry_after_s"] == int(refused.headers["Retry-After"])
        assert ask(http, second, 1) == [200], "another key of the tenant is not meant"


def test_a_tenant_s_keys_count_together(world: World) -> None:
    keys = [make_key(world), make_key(world)]
    with world.http(tenant_requests_per_min=4) as http:
        assert ask(http, keys[0], 2) + ask(http, keys[1], 3) == [200] * 4 + [429]
        assert ask(http, make_key(world, "other"), 1) == [200]


def test_no_limit_is_no_limit_and_the_laptop_has_none(world: World) -> None:
    key = make_key(world)
    with world.http(key_requests_per_min=0, tenant_requests_per_min=0) as http:
        assert ask(http, key, 20) == [200] * 20
    with world.http(key_requests_per_min=1, tenant_requests_per_min=1) as http:
        assert ask(http, {}, 5) == [200] * 5


def test_wrong_keys_shut_out_their_address_and_no_other(world: World) -> None:
    good, wrong = make_key(world), {"Authorization": "Bearer ek_00000000_" + "A" * 43}
    app = world.app(wrong_keys_per_min=3)
    with http_from(world, "192.0.2.1", app) as rude, http_from(world, "192.0.2.2", app) as kind:
        assert ask(rude, wrong, 4) == [401] * 3 + [429]
        assert ask(rude, good, 1) == [429], "the key is not looked at: guessing on is of no use"
        assert ask(kind, good, 2) == [200, 200]
        assert rude.get("/healthz").status_code == 200


def test_good_keys_cost_an_address_nothing(world: World) -> None:
    """Control."""
    with http_from(world, "192.0.2.1", wrong_keys_per_min=2) as http:
        assert ask(http, make_key(world), 9) == [200] * 9


@pytest.mark.parametrize(("proxies", "statuses"), [((), [401, 401, 429]), (("172.16.0.0/12",), [401, 401, 401])])
def test_behind_a_trusted_proxy_the_client_s_address_counts(
    world: World, proxies: tuple[str, ...], statuses: list[int]
) -> None:
    settings = world.settings.model_copy(update={"trusted_proxies": proxies, "wrong_keys_per_min": 2})
    config = make_config(settings, world.app(wrong_keys_per_min=2))
    config.load()
    wrong = "Bearer ek_00000000_" + "A" * 43
    with http_from(world, "172.17.0.9", config.loaded_app) as http:
        found = [
            http.get("/v1/recipes", headers={"Authorization": wrong, "X-Forwarded-For": f"192.0.2.{number}"})
            for number in range(3)
        ]
    assert [answer.status_code for answer in found] == statuses


def test_replicas_count_together_in_redis(world: World) -> None:
    key = make_key(world)
    with redis_url() as url:
        settings = {"broker_url": url, "key_requests_per_min": 5}
        with world.http(**settings) as first, world.http(**settings) as second:
            assert ask(first, key, 3) + ask(second, key, 3) == [200] * 5 + [429]
    with world.http(key_requests_per_min=5) as first, world.http(key_requests_per_min=5) as second:
        assert ask(first, key, 3) + ask(second, key, 3) == [200] * 6, "control: without Redis each counts alone"


def test_without_redis_each_replica_goes_on_counting(world: World) -> None:
    key = make_key(world)
    with world.http(broker_url=f"redis://127.0.0.1:{free_port()}/0", key_requests_per_min=3) as http:
        assert ask(http, key, 4) == [200] * 3 + [429]


def test_the_sdk_waits_as_long_as_the_server_says(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    bodies: list[bytes] = []
    monkeypatch.setattr("service.client.time.sleep", pauses.append)

    def answer(after: str) -> Callable[[httpx.Request], httpx.Response]:
        def handle(request: httpx.Request) -> httpx.Response:
            bodies.append(request.read())
            if len(bodies) < 3:
                problem = {"code": "rate_limited", "detail": "Slowly.", "retryable": True, "details": {}}
                return httpx.Response(429, json=problem, headers={"Retry-After": after})
            return httpx.Response(201, json={"sha256": "a" * 64, "jobs": [], "next": None})

        return handle

    file = world.folder / "text.txt"
    file.write_bytes(b"some text")
    with Client("http://kiln.example", transport=httpx.MockTransport(answer("7"))) as kiln:
        with pytest.raises(Exception, match="changed while it was uploaded"):
            kiln.upload(file)
    assert pauses == [7, 7]
    assert bodies == [b"some text"] * 3, "sent whole each time"
    # Control: longer than its patience it does not wait.
    bodies.clear()
    with Client("http://kiln.example", transport=httpx.MockTransport(answer("90"))) as kiln:
        with pytest.raises(RateLimited):
            list(kiln.list())
    assert pauses == [7, 7]
