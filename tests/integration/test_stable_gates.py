"""Gates on speed read stable measurements only, and a refusal says what was wrong with the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.errors import GateRefused
from service.ledger import jobs
from tests.api_world import World, make_world
from tests.ledger_play import TOOLCHAIN
from tests.measured_play import CALM, MeasuredPlay, measured
from workers.publish import publish

GATES = {"min_decode_tokens_per_s": 50.0, "max_peak_anon_bytes": 2e8}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with make_world(tmp_path) as made:
        yield made


def publish_with(world: World, **fields: object) -> list[str]:
    """Publish a variant whose benchmark found this; return the names of its artifacts."""
    play = MeasuredPlay(world)
    play.next_figures = measured(CALM, **fields)
    play.submit(world.source["path"], recipes=["none"], formats=["litertlm"], devices=["host"], gates=GATES)
    claim = play.claim_kind("publish")
    found = publish(world.database, world.store, claim, TOOLCHAIN)
    return [artifact["name"] for artifact in found["artifacts"]]


def test_control_a_stable_measurement_passes(world: World) -> None:
    assert publish_with(world) == ["tiny-none.litertlm"]


@pytest.mark.parametrize("verdict", ["noisy", "hot", "short"])
def test_what_is_not_stable_passes_no_gate_and_the_refusal_says_so(world: World, verdict: str) -> None:
    with pytest.raises(GateRefused, match=f"litertlm on Acme One was {verdict}") as caught:
        publish_with(world, verdict=verdict)
    missed = caught.value.details["missed"]
    assert {each["gate"] for each in missed} == GATES.keys()
    assert all(each["figure"] is None for each in missed)


def test_a_gate_that_needs_no_benchmark_does_not_mind(world: World) -> None:
    play = MeasuredPlay(world)
    job_id = play.measure(measured(verdict="hot"))
    assert play.job(job_id)["state"] == "succeeded"


def test_a_retry_measures_again_what_was_not_stable_and_keeps_what_was(world: World) -> None:
    play = MeasuredPlay(world)
    play.next_figures = measured(CALM, verdict="hot")
    fields: dict[str, Any] = {"recipes": ["none"], "formats": ["litertlm"], "devices": ["host"]}
    job_id = play.submit(world.source["path"], **fields, gates=GATES)
    claim = play.claim_kind("publish")
    with pytest.raises(GateRefused) as caught:
        publish(world.database, world.store, claim, TOOLCHAIN)
    play.fail(claim, caught.value)
    play.next_figures = measured(CALM)
    jobs.retry_job(world.database, "default", job_id)
    assert play.run_all() == ["plan", "benchmark", "publish"]
    assert play.job(job_id)["state"] == "succeeded"

    job_id = play.submit(world.source["path"], **fields, gates={**GATES, "min_decode_tokens_per_s": 5000.0})
    claim = play.claim_kind("publish")
    with pytest.raises(GateRefused) as caught:
        publish(world.database, world.store, claim, TOOLCHAIN)
    play.fail(claim, caught.value)
    jobs.retry_job(world.database, "default", job_id)
    play.finish(play.claim_kind_only("plan"))
    assert play.step_states(job_id)["benchmark"] == ["succeeded"], "nobody measures until it suits"
