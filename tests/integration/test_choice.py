"""Comparison and pick through every door: REST, SDK, command, and a data directory that nobody serves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from service.api import schemas
from service.cli import app
from service.client import Client
from service.data_dir import DataDirLock
from service.errors import GateRefused, UnknownName
from service.gates import GATES
from service.ledger import access
from service.ledger.claims import Claim
from tests.api_world import ARTIFACT_BYTES, World, make_world

RECIPES = ("none", "dynamic_int8", "dynamic_int4")
MISSED = {"gate": "max_kl", "figure_name": "parity.kl_mean", "bound": "at_most", "passed": False, "sentence": "No."}


@dataclass(frozen=True)
class Shop:
    """A service with one job of three recipes, of which the last was refused."""

    world: World
    http: TestClient
    job_id: str


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with make_world(tmp_path_factory.mktemp("shop")) as world, world.http() as http:
        fields = {"recipes": RECIPES, "formats": ["tflite", "litertlm"], "devices": ["host"]}
        job_id = http.post("/v1/jobs", json={"source": world.source, **fields}).json()["id"]
        play = world.play()

        def is_refused(claim: Claim) -> bool:
            return claim.kind == "publish" and claim.params["recipe"] == RECIPES[-1]

        while (claim := play.claim()) is not None:
            if is_refused(claim):
                play.fail(claim, GateRefused("No.", missed=[{**MISSED, "figure": 0.125, "threshold": 0.1}]))
            else:
                play.finish(claim)
        yield Shop(world, http, job_id)


def get(shop: Shop, what: str, **query: Any) -> Any:
    return shop.http.get(f"/v1/jobs/{shop.job_id}/{what}", params=query)


def test_a_comparison_reads_as_the_schema_says(shop: Shop) -> None:
    document = get(shop, "comparison").json()
    schemas.ComparisonDocument.model_validate(document)
    assert (document["job_id"], document["state"], document["is_final"]) == (shop.job_id, "partial", True)
    assert [front["format"] for front in document["formats"]] == ["litertlm", "tflite"]
    for front in document["formats"]:
        assert [each["variant"] for each in front["candidates"]] == list(RECIPES)
        none, _, refused = front["candidates"]
        assert none["artifact"]["kind"] == front["format"]
        assert none["figures"].keys() >= {gate.figure_name for gate in GATES.values()}
        assert (none["figures"]["parity.kl_mean"], none["figures"]["size_bytes"]) == (0.125, ARTIFACT_BYTES)
        assert none["figures"]["benchmark.decode_tokens_per_s"] == 321.0
        assert none["figures"]["benchmark.peak_anon_bytes"] is None
        assert (none["is_pareto"], refused["is_pareto"]) == (True, None)
        assert (refused["state"], refused["artifact"], refused["error"]["code"]) == ("refused", None, "gate_refused")
        assert refused["figures"]["parity.kl_mean"] == 0.125
        assert front["axes"] == ["quality", "size", "speed"]
        assert front["missing"] == {"memory": ["none", "dynamic_int8"]}


def test_a_pick_reads_as_the_schema_says(shop: Shop) -> None:
    document = get(shop, "pick", max_size_bytes=2e6, min_exact_match=0.5, prefer="speed").json()
    schemas.PickDocument.model_validate(document)
    assert (document["format"], document["prefer"]) == ("litertlm", "speed")
    assert document["bounds"] == {"max_size_bytes": 2e6, "min_exact_match": 0.5}
    assert document["picked"]["artifact"]["name"] == "tiny-none.litertlm"
    assert [verdict["gate"] for verdict in document["picked"]["constraints"]] == ["max_size_bytes", "min_exact_match"]
    assert [each["variant"] for each in document["also_fit"]] == ["dynamic_int8"]
    (refused,) = document["excluded"]
    assert (refused["variant"], refused["objections"]) == ("dynamic_int4", ["It is refused, not published: No."])
    assert document["nearest"] is None


def test_none_fits_is_an_answer(shop: Shop) -> None:
    answer = get(shop, "pick", max_kl=0.1)
    document = answer.json()
    schemas.PickDocument.model_validate(document)
    assert (answer.status_code, document["picked"]) == (200, None)
    assert document["nearest"]["variant"] == "none"
    assert "is 0.125; the gate max_kl asks for at most 0.1" in document["reason"]


@pytest.mark.parametrize(
    ("query", "code", "words"),
    [
        ({"max_size": 1}, "invalid_request", "max_size"),
        ({"max_kl": "little"}, "invalid_request", "max_kl"),
        ({"max_kl": "nan"}, "invalid_request", "finite"),
        ({"prefer": "sped"}, "unknown_name", "speed"),
        ({"format": "task"}, "invalid_request", "makes litertlm, tflite; not task"),
        ({"engine": "keras"}, "unknown_name", "reauthored"),
    ],
)
def test_a_query_that_means_nothing_is_refused(shop: Shop, query: dict[str, Any], code: str, words: str) -> None:
    problem = get(shop, "pick", **query).json()
    assert (problem["status"], problem["code"]) == (422, code)
    assert words in problem["detail"]


def test_another_tenants_job_is_not_there(shop: Shop) -> None:
    access.ensure_tenant(shop.world.database, "other")
    key = access.create_key(shop.world.database, "other", "ci").secret
    for what in ("comparison", "pick"):
        answer = shop.http.get(f"/v1/jobs/{shop.job_id}/{what}", headers={"Authorization": f"Bearer {key}"})
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_a_job_that_has_made_nothing_yet_has_no_best(shop: Shop) -> None:
    fields = {"source": shop.world.source, "recipes": ["float16"]}
    job_id = shop.http.post("/v1/jobs", json=fields).json()["id"]
    document = shop.http.get(f"/v1/jobs/{job_id}/comparison").json()
    (candidate,) = document["formats"][0]["candidates"]
    assert (candidate["state"], candidate["is_pareto"], set(candidate["figures"].values())) == ("pending", None, {None})
    picked = shop.http.get(f"/v1/jobs/{job_id}/pick").json()
    assert (picked["picked"], picked["nearest"]) == (None, None)
    assert "has published no litertlm" in picked["reason"]


# --- SDK and commands -----------------------------------------------------------------------------

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def url(shop: Shop) -> Iterator[str]:
    with shop.world.server() as served:
        yield served


def test_the_sdk_compares_and_picks(shop: Shop, url: str) -> None:
    with Client(url) as client:
        assert client.compare(shop.job_id) == get(shop, "comparison").json()
        picked = client.pick(shop.job_id, max_size_bytes=2e6, prefer="size")
        assert picked == get(shop, "pick", max_size_bytes=2e6, prefer="size").json()
        with pytest.raises(UnknownName):
            client.pick(shop.job_id, prefer="beauty")


def test_compare_prints_a_table_that_fits(shop: Shop, run: Run) -> None:
    result = run("compare", shop.job_id)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 100
    rows = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "● dynamic_int8 1.1 MB 0.12 50.0% 321" in rows
    assert "✗ dynamic_int4 1.1 MB 0.12 50.0% 321" in rows
    assert "memory is not compared: not measured." in rows
    assert "✗ dynamic_int4 refused: max_kl: 0.125, at most 0.1" in rows
    one = json.loads(run("compare", shop.job_id, "--format", "tflite", "--json").stdout)
    assert [front["format"] for front in one["formats"]] == ["tflite"]
    wrong = run("compare", shop.job_id, "--format", "task")
    assert (wrong.exit_code, wrong.stdout) == (2, "")


def test_compare_draws_a_picture(shop: Shop, run: Run, tmp_path: Path) -> None:
    result = run("compare", shop.job_id, "--plot", tmp_path / "front.svg", "--json")
    assert (result.exit_code, result.stderr) == (0, f"{tmp_path / 'front.svg'} shows litertlm.\n")
    assert json.loads(result.stdout)["job_id"] == shop.job_id
    assert shop.job_id in (tmp_path / "front.svg").read_text()
    wrong = run("compare", shop.job_id, "--plot", tmp_path / "front.png")
    assert (wrong.exit_code, "ends in .svg" in wrong.stderr) == (2, True)


def test_pick_prints_the_file_and_says_why(shop: Shop, run: Run) -> None:
    result = run("pick", shop.job_id, "--max-size", "2MB", "--min-exact-match", 0.5, "--gate", "max_kl_worst=1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "max_kl_worst: not measured, at most 1" in result.stderr
    result = run("pick", shop.job_id, "--max-size", "2MB", "--min-exact-match", 0.5)
    assert (result.exit_code, result.stdout) == (0, "tiny-none.litertlm\n")
    assert "are equal; the job names 'none' first." in result.stderr
    assert "max_size_bytes: 1.1 MB, at most 2.0 MB" in result.stderr
    assert "✗ dynamic_int4 refused: max_kl: 0.125, at most 0.1" in result.stderr


def test_pick_exits_with_1_and_the_nearest_when_none_fits(shop: Shop, run: Run) -> None:
    result = run("pick", shop.job_id, "--max-size", "1MB")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("None fits. The nearest is 'none': max_size_bytes: 1.1 MB, at most 1.0 MB\n")
    document = run("pick", shop.job_id, "--max-size", "1MB", "--json")
    assert (document.exit_code, json.loads(document.stdout)["picked"]) == (1, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-size", "1,5GB"], "invalid_request: '1,5GB' is not a size"),
        (["--prefer", "sped"], "Did you mean 'speed'"),
        (["--engine", "trace"], "Did you mean 'traced'"),
        (["--gate", "max_clue=1"], "Did you mean 'max_kl'"),
        (["--url", "http://127.0.0.1:1", "--data-dir", "."], "name two places"),
    ],
)
def test_a_wish_that_means_nothing_is_a_usage_error(run: Run, arguments: list[str], words: str) -> None:
    result = run("pick", "job_0", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr


def test_a_data_directory_answers_without_a_server(shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EDGEKILN_URL", raising=False)
    runner = CliRunner()
    data_dir = str(shop.world.settings.data_dir)
    named = runner.invoke(app, ["pick", shop.job_id, "--data-dir", data_dir])
    assert (named.exit_code, named.stdout) == (0, "tiny-none.litertlm\n")
    compared = runner.invoke(app, ["compare", shop.job_id, "--data-dir", data_dir, "--json"])
    assert json.loads(compared.stdout) == get(shop, "comparison").json()
    unknown = runner.invoke(app, ["compare", "job_0", "--data-dir", data_dir])
    assert (unknown.exit_code, unknown.stderr[:10]) == (1, "not_found:")
    nowhere = runner.invoke(app, ["compare", "job_0", "--data-dir", str(tmp_path / "nowhere")])
    assert (nowhere.exit_code, nowhere.stderr[:10]) == (1, "not_found:")
    assert not (tmp_path / "nowhere").exists()


def test_where_no_server_answers_the_default_data_directory_does(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEKILN_URL", raising=False)
    # Nobody listens there.
    monkeypatch.setattr("service.client.DEFAULT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("EDGEKILN_DATA_DIR", str(shop.world.settings.data_dir))
    result = CliRunner().invoke(app, ["pick", shop.job_id])
    assert (result.exit_code, result.stdout) == (0, "tiny-none.litertlm\n")
    assert "No server answers; reading" in result.stderr
    monkeypatch.setenv("EDGEKILN_URL", "http://127.0.0.1:1")
    named = CliRunner().invoke(app, ["pick", shop.job_id])
    assert (named.exit_code, named.stderr[:20]) == (1, "service_unavailable:")


def test_a_data_directory_that_is_served_is_asked_through_its_server(shop: Shop, url: str, run: Run) -> None:
    lock = DataDirLock(shop.world.settings.data_dir)
    lock.acquire()
    try:
        lock.announce(url)
        assert run("pick", shop.job_id, "--data-dir", lock.data_dir).stdout == "tiny-none.litertlm\n"
    finally:
        lock.release()
