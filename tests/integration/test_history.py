"""Measurements over time through every door: REST, SDK, command; differences, and regressions as events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from typer.testing import CliRunner

from service.api import schemas
from service.cli import app
from service.client import Client
from service.commands.progress import format_regression
from service.ledger import views
from tests.api_world import World, make_world
from tests.ledger_play import TOOLCHAIN
from tests.measured_play import CALM, MeasuredPlay, measured
from workers.runner import Runner
from workers.sandbox import ChildResult, Sandbox

PHONE = measured()["device"]
NEWER = {**PHONE, "tool": {"name": "tool", "version": "2"}}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with make_world(tmp_path) as made:
        yield made


def scaled(factor: float) -> list[float]:
    return [sample * factor for sample in CALM]


def find_regressions(play: MeasuredPlay, job_id: str) -> list[dict[str, Any]]:
    events = views.read_events(play.database, play.tenant_id, job_id, 0)["events"]
    return [event["data"] for event in events if event["kind"] == "regression"]


def test_two_measurements_through_every_door(world: World, tmp_path: Path) -> None:
    play = MeasuredPlay(world)
    jobs = [
        play.measure(measured()),
        play.measure(measured(scaled(1.2), device=NEWER)),
        play.measure(measured(verdict="hot")),
    ]
    with world.http() as http:
        answer = http.get("/v1/measurements", params={"model": "tiny", "device": "R5CT1"}).json()
        schemas.HistoryDocument.model_validate(answer)
        entries = answer["measurements"]
        assert [entry["job_id"] for entry in entries] == jobs
        assert [entry["verdict"] for entry in entries] == ["stable", "stable", "hot"]
        assert http.get("/v1/measurements", params={"limit": 1}).json()["measurements"] == entries[-1:]
        for unfit in ({"model": "other"}, {"device": "other"}, {"variant": "other"}, {"format": "task"}):
            assert http.get("/v1/measurements", params=unfit).json() == {"measurements": []}
        first, second, hot = (entry["id"] for entry in entries)
        found = http.get("/v1/measurements/difference", params={"baseline": first, "candidate": second}).json()
        schemas.DifferenceDocument.model_validate(found)
        assert found["differs"] == ["tool", "date"]
        speed = next(change for change in found["changes"] if change["metric"] == "decode_tokens_per_s")
        assert speed["verdict"] == "faster"
        assert speed["interval"][0] < 1.2 < speed["interval"][1]
        refused = http.get("/v1/measurements/difference", params={"baseline": first, "candidate": hot})
        assert (refused.status_code, refused.json()["code"]) == (422, "not_comparable")
        absent = http.get("/v1/measurements/difference", params={"baseline": first, "candidate": "step_0"})
        assert absent.status_code == 404
    with world.server() as url:
        with Client(url) as client:
            assert client.history(model="tiny") == entries
            assert client.difference(first, second) == found
        run = CliRunner().invoke
        assert json.loads(run(app, ["history", "--json", "--url", url]).stdout) == entries
        picture = tmp_path / "history.svg"
        table = run(app, ["history", "--plot", str(picture), "--url", url])
        assert table.exit_code == 0, table.output
        assert all(entry["id"] in table.stdout for entry in entries)
        marks = [each.tag.rpartition("}")[2] for each in ET.fromstring(picture.read_text()).iter()]
        assert marks.count("path") == 1, "the hot one"
        told = run(app, ["difference", first, second, "--url", url])
        assert "faster" in told.stdout
        assert "differ in tool, date" in told.stderr


def test_a_regression_is_an_event_that_names_both(world: World) -> None:
    play = MeasuredPlay(world)
    before = play.measure(measured())
    after = play.measure(measured(scaled(0.85), device=NEWER, peak_anon_bytes=150_000_000))
    found = {each["metric"]: each for each in find_regressions(play, after)}
    assert found.keys() == {"decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s", "peak_anon_bytes"}
    regression = found["decode_tokens_per_s"]
    assert (regression["verdict"], regression["baseline_job_id"]) == ("slower", before)
    steps = [
        next(step["id"] for step in play.job(job)["steps"] if step["kind"] == "benchmark") for job in (before, after)
    ]
    assert [regression["baseline_id"], regression["step_id"]] == steps
    assert regression["interval"][0] < 0.85 < regression["interval"][1]
    assert "slower: decode_tokens_per_s 85" in format_regression(regression)


def test_control_within_the_bar_there_is_none(world: World) -> None:
    play = MeasuredPlay(world)
    play.measure(measured())
    assert find_regressions(play, play.measure(measured(scaled(0.93)))) == []
    # The same data with a lower bar.
    play.measure(measured())
    play.regression_share = 0.03
    assert find_regressions(play, play.measure(measured(scaled(0.93)))) != []


def test_only_stable_measurements_of_one_series_are_held_against_each_other(world: World) -> None:
    play = MeasuredPlay(world)
    play.measure(measured())
    for other in (
        measured(scaled(0.5), verdict="noisy"),
        measured(scaled(0.5), threads=2),
        measured(scaled(0.5), device={**PHONE, "serial": "another"}),
        measured(scaled(0.5), device={**PHONE, "kind": "virtual"}),
        measured(scaled(0.5), backend="gpu"),
    ):
        assert find_regressions(play, play.measure(other)) == []
    # None of them has become what the next one is held against.
    assert find_regressions(play, play.measure(measured(scaled(0.98)))) == []


def test_a_later_benchmark_of_an_artifact_continues_its_series(world: World) -> None:
    play = MeasuredPlay(world)
    first = play.measure(measured())
    with world.http() as http:
        (artifact,) = http.get(f"/v1/jobs/{first}/artifacts").json()["artifacts"]
        later = http.post(f"/v1/artifacts/{artifact['id']}/benchmarks", json={"devices": ["host"]}).json()["id"]
        play.next_figures = measured(scaled(0.8))
        play.run_all()
        assert [entry["job_id"] for entry in http.get("/v1/measurements").json()["measurements"]] == [first, later]
    assert {each["baseline_job_id"] for each in find_regressions(play, later)} == {first}


def test_arms_of_one_run_are_measurements_of_their_own(world: World) -> None:
    play = MeasuredPlay(world)

    def make_arms(gpu: float) -> dict[str, Any]:
        error = {"code": "request_unfit", "message": "There is none.", "retryable": False, "details": {}}
        return {
            "arms": [
                measured(interleaved=f"run of {gpu}/1"),
                measured(scaled(gpu)[::-1], backend="gpu", threads=None, interleaved=f"run of {gpu}/1"),
                {"format": "litertlm", "backend": "npu", "threads": None, "error": error},
            ]
        }

    play.measure(make_arms(2.0))
    later = play.measure(make_arms(1.5))
    with world.http() as http:
        entries = http.get("/v1/measurements").json()["measurements"]
        assert [entry["backend"] for entry in entries] in (["cpu", "gpu"] * 2, ["gpu", "cpu"] * 2)
        ids = {entry["backend"]: entry["id"] for entry in entries[:2]}
        pair = {"baseline": ids["cpu"], "candidate": ids["gpu"]}
        found = http.get("/v1/measurements/difference", params=pair).json()
        assert {change["metric"]: change["verdict"] for change in found["changes"]}["decode_tokens_per_s"] == "faster"
        away = {**pair, "candidate": ids["gpu"].replace(".2", ".3")}
        assert http.get("/v1/measurements/difference", params=away).status_code == 404
    (regression,) = [each for each in find_regressions(play, later) if each["metric"] == "decode_tokens_per_s"]
    assert regression["baseline_id"] == ids["gpu"]


class PlayedSandbox(Sandbox):
    """Runs no process: every child has found `figures`."""

    def __init__(self, figures: dict[str, Any]) -> None:
        self._figures = figures

    def warm(self, pool: str) -> None:
        pass

    def run(self, target: str, params: Any, inputs: Any, step_dir: Path, **options: Any) -> ChildResult:
        (step_dir / "output").mkdir(parents=True)
        (step_dir / "output" / "measurement.json").write_text("{}")
        (step_dir / "log.txt").write_text("measured\n")
        return ChildResult(
            figures=self._figures,
            error=None,
            stopped=None,
            output_dir=step_dir / "output",
            log_path=step_dir / "log.txt",
            peak_rss_bytes=2,
            peak_anon_bytes=1,
            duration_s=1.0,
            isolation="strong",
            isolation_reasons=(),
        )


@pytest.mark.parametrize(("factor", "is_regression"), [(0.8, True), (0.93, False)])
def test_the_runner_looks_for_regressions(world: World, factor: float, is_regression: bool) -> None:
    play = MeasuredPlay(world)
    play.measure(measured())
    job_id = play.submit(world.source["path"], recipes=["none"], formats=["litertlm"], devices=["host"])
    while (claim := play.claim("fetch", "convert", "light")) is not None:
        play.finish(claim)
    sandbox = PlayedSandbox(measured(scaled(factor)))
    work_dir = world.folder / "work"
    runner = Runner(world.settings, world.database, world.store, sandbox, play.worker_id, TOOLCHAIN, work_dir)
    assert runner.run_next("device")
    assert play.job(job_id)["state"] == "succeeded"
    assert bool(find_regressions(play, job_id)) == is_regression
