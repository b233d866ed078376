"""Text that no database holds, or no terminal should be sent: refused wherever a user may write some.

Parameters and bodies are found in the OpenAPI document; a route with a body without a case here fails.
"""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from service.devices import TOOLS
from service.ledger import access, devices
from service.ledger.database import Database
from service.sealing import make_sealing_key
from tests.api_world import World, make_world

#: NUL, half of a surrogate pair, and the beginning of a terminal's command.
BAD = {"NUL": "\x00", "surrogate": "\ud800", "escape": "\x1b"}
#: The same three, percent-encoded in a URL.
BAD_BYTES = {"NUL": "%00", "surrogate": "%ED%A0%80", "escape": "%1B"}
METHODS = ("get", "put", "post", "delete", "patch", "head")
DEVICE = "serial-1"


@pytest.fixture(params=["sqlite", "postgresql"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[World, TestClient]]:
    with make_world(tmp_path) as world:
        if request.param == "postgresql":
            world = replace(world, database=Database(request.getfixturevalue("postgres_ledger_url")))
        access.ensure_tenant(world.database, "default")
        with world.http(token_keys=(make_sealing_key(),), source_s3_buckets=("models",)) as http:
            yield world, http
        world.database.close()


def make_cases(world: World, http: TestClient) -> dict[tuple[str, str], tuple[str, list[Any]]]:
    """Return, for each operation that takes JSON, an address and bodies that it accepts; every text field is in one."""
    digest = http.post("/v1/uploads", content=b'{"prompt": "a", "answer": "b"}\n').json()["sha256"]
    files = dict.fromkeys(("config.json", "model.safetensors", "tokenizer.json"), digest)
    config = {"weight_tensor_config": {"num_bits": 8, "granularity": "CHANNELWISE"}, "compute_precision": "INTEGER"}
    own = [{"regex": ".*", "operation": "FULLY_CONNECTED", "op_config": config}]
    job = {"source": world.source, "recipes": ["none"], "engines": ["auto"], "formats": ["tflite"]}
    hub = {"kind": "hub", "repo": "kilns/tiny", "revision": "main"}
    web = {"kind": "https", "url": "https://models.example.org/mine/", "files": list(files)}
    jobs = [
        {**job, "evaluation": digest, "perplexity_text": digest, "devices": ["host"], "gates": {"max_kl": 0.5}},
        {**job, "source": hub, "backends": ["cpu"], "devices": ["tag=desk"]},
        {**job, "source": web},
        {**job, "source": {"kind": "s3", "bucket": "models", "prefix": "mine"}},
        {**job, "source": {"kind": "upload", "files": files, "name": "mine"}},
        {
            **job,
            "recipes": ["mine"],
            "own_recipes": {"mine": own},
            "calibration": {"kind": "prompts", "upload": digest},
        },
    ]
    schedule = {"name": "nightly", "cron": "0 3 * * *", "time_zone": "UTC", "missed": "once", "overlap": "skip"}
    key = http.post("/v1/keys", json={"name": "first"}).json()["id"]
    tool = next(iter(TOOLS.values()))
    tool_request = {"name": tool, "version": "1", "abi": "arm64-v8a", "files": {tool: digest}}
    play = world.play()
    job_id = http.post("/v1/jobs", json=job).json()["id"]
    play.run_all()
    artifact_id = http.get(f"/v1/jobs/{job_id}/artifacts").json()["artifacts"][0]["id"]
    benchmarks = f"/v1/artifacts/{artifact_id}/benchmarks"
    devices.register_device(world.database, play.worker_id, DEVICE, {"kind": "phone", "serial": DEVICE}, [DEVICE])
    return {
        ("post", "/v1/jobs"): ("/v1/jobs", jobs),
        ("post", "/v1/schedules"): (
            "/v1/schedules",
            [{**schedule, "job": each, "name": f"nightly {at}"} for at, each in enumerate(jobs)],
        ),
        ("post", "/v1/keys"): ("/v1/keys", [{"name": "mine", "scopes": ["read"]}]),
        ("post", "/v1/keys/{key_id}/rotate"): (f"/v1/keys/{key}/rotate", [{}]),
        ("put", "/v1/tokens/{kind}"): ("/v1/tokens/hub", [{"token": "hf_mine"}]),
        ("put", "/v1/devices/{device_id}/tags"): (f"/v1/devices/{DEVICE}/tags", [{"tags": ["desk"]}]),
        ("post", "/v1/tools"): ("/v1/tools", [tool_request]),
        ("post", "/v1/artifacts/{artifact_id}/benchmarks"): (
            benchmarks,
            [{"devices": ["tag=desk"], "backends": ["cpu"]}],
        ),
    }


def find_texts(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where in a body a text stands; a free name of an object ends in None."""
    if isinstance(value, str):
        yield place
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(value, dict) and place and place[-1] in FREE_NAMES:
            yield (*place, key, None)
        yield from find_texts(item, (*place, key))


#: Objects whose names are the user's.
FREE_NAMES = ("files", "own_recipes", "gates")


def spoil(body: Any, place: tuple[Any, ...], bad: str) -> Any:
    spoiled = copy.deepcopy(body)
    target = spoiled
    *way, last = place[:-1] if place[-1] is None else place
    for step in way:
        target = target[step]
    if place[-1] is None:
        target[f"{last}{bad}"] = target.pop(last)
    else:
        target[last] += bad
    return spoiled


def find_fields(document: dict[str, Any], schema: Any) -> set[str]:
    """Return the names of all fields below a body's schema that may hold a text."""
    if not isinstance(schema, dict):
        return set()
    if "$ref" in schema:
        return find_fields(document, document["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
    found: set[str] = set()
    for name, field in schema.get("properties", {}).items():
        inner = find_fields(document, field)
        found |= inner | ({name} if holds_text(document, field) else set())
    for part in (
        *schema.get("anyOf", ()),
        *schema.get("oneOf", ()),
        schema.get("items"),
        schema.get("additionalProperties"),
    ):
        found |= find_fields(document, part)
    return found


def holds_text(document: dict[str, Any], schema: Any) -> bool:
    if not isinstance(schema, dict):
        return False
    parts = (
        *schema.get("anyOf", ()),
        *schema.get("oneOf", ()),
        schema.get("items"),
        schema.get("additionalProperties"),
    )
    return schema.get("type") == "string" or any(holds_text(document, part) for part in parts)


def list_names(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | set().union(*map(list_names, value.values()))
    return set().union(*map(list_names, value)) if isinstance(value, list) else set()


def test_no_text_of_a_body_is_stored_that_cannot_be(served: tuple[World, TestClient]) -> None:
    world, http = served
    document = http.get("/openapi.json").json()
    cases = make_cases(world, http)
    operations = {
        (method, path): operation["requestBody"]["content"]["application/json"]["schema"]
        for path, found in document["paths"].items()
        for method, operation in found.items()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    }
    assert operations.keys() == cases.keys()
    failed, accepted = [], []
    for operation, schema in operations.items():
        address, bodies = cases[operation]
        assert find_fields(document, schema) <= list_names(bodies), operation
        for body in bodies:
            for place in find_texts(body):
                for name, bad in BAD.items():
                    answer = send(http, operation[0], address, spoil(body, place, bad))
                    failed += [(operation, place, name)] if answer.is_server_error else []
                    accepted += [(operation, place, name)] if answer.is_success else []
            assert (failed, accepted) == ([], []), body
            control = send(http, operation[0], address, body)
            assert control.is_success, (operation, body, control.text)


def send(http: TestClient, method: str, address: str, body: Any) -> httpx.Response:
    return http.request(method, address, content=json.dumps(body), headers={"Content-Type": "application/json"})


def test_no_text_of_an_address_is_more_than_not_found(served: tuple[World, TestClient]) -> None:
    _world, http = served
    tried = 0
    for path, operations in http.get("/openapi.json").json()["paths"].items():
        for method in METHODS:
            for parameter in operations.get(method, {}).get("parameters", ()):
                if parameter["in"] == "header" or not holds_text({}, parameter["schema"]):
                    continue
                for name, bad in BAD_BYTES.items():
                    address = path.replace(f"{{{parameter['name']}}}", f"x{bad}") if parameter["in"] == "path" else path
                    query = f"?{parameter['name']}=x{bad}" if parameter["in"] == "query" else ""
                    answer = http.request(method, f"{address}{query}", content=b"text")
                    assert answer.status_code < 500 or path == "/readyz", (method, path, parameter["name"], name)
                    # What is not UTF-8 was replaced before anybody looked at it; what is only looked for is not kept.
                    is_harmless = name == "surrogate" or method in ("get", "head")
                    assert is_harmless or not answer.is_success, (method, path, parameter["name"], name)
                    tried += 1
    assert tried > 50


@pytest.mark.parametrize("name", [b"\x00", b"\xed\xa0\x80", b"\x1b"])
def test_no_name_of_an_upload_in_pieces_either(served: tuple[World, TestClient], name: bytes) -> None:
    _world, http = served

    def begin(name: bytes) -> int:
        encoded = base64.b64encode(name).decode()
        headers = {"Tus-Resumable": "1.0.0", "Upload-Length": "1", "Upload-Metadata": f"filename {encoded}"}
        return http.post("/v1/uploads/resumable", headers=headers).status_code

    assert (begin(name), begin(b"control")) == (422, 201)
