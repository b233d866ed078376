"""Upgrades: what was planned for tools that are gone is planned anew, and nothing that is finished is lost."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select, update

from service.errors import ToolchainChanged
from service.ledger import claims, fleet, replan, results
from service.ledger.claims import Claim
from service.ledger.clock import now
from service.ledger.database import Database
from service.ledger.keys import Toolchain
from service.ledger.tables import Step, Worker
from tests.ledger_play import BENCHMARK, POLICY, SLOTS, Play, figures_of, outputs_of

NEWER = Toolchain({"converter": "2"}, {"convert": "b", "quantize": "b"})


@pytest.fixture
def play(database: Database) -> Play:
    return Play(database)


class Upgraded:
    """A worker with newer tools, after those with the old ones have gone."""

    def __init__(self, play: Play, slots: dict[str, int] = SLOTS) -> None:
        self.play = play
        play.database.write(lambda tx: tx.connection.execute(update(Worker).values(heartbeat_at=now(-3600))))
        facts: dict[str, Any] = {"cores": 2, "memory_bytes": 9, "memory_limit_bytes": 9, "isolation": {}}
        self.worker_id = fleet.register_worker(play.database, "host-b", toolchain=NEWER, slots=slots, **facts)

    def claim(self, resource_class: str) -> Claim | None:
        return claims.claim_next(self.play.database, self.worker_id, resource_class, POLICY)

    def finish(self, claim: Claim, toolchain: Toolchain = NEWER) -> None:
        success = results.Success(figures_of(claim), outputs_of(claim))
        results.finish_step(self.play.database, claim, success, toolchain, BENCHMARK)

    def run_all(self) -> list[str]:
        kinds = []
        while claim := next(filter(None, map(self.claim, SLOTS)), None):
            kinds.append(claim.kind)
            self.finish(claim)
        return kinds


def plan(play: Play) -> None:
    while (claim := play.claim("fetch", "light")) is not None:
        play.finish(claim)


def forget_pauses(play: Play) -> None:
    play.database.write(lambda tx: tx.connection.execute(update(Step).values(run_after=None)))


def test_a_step_whose_tools_are_gone_is_planned_anew_for_every_job_that_wants_it(play: Play) -> None:
    jobs = [play.submit(recipes=["none"], formats=["tflite"]) for _ in range(2)]
    plan(play)
    upgraded = Upgraded(play)
    assert upgraded.claim("convert") is None
    assert [play.step_states(job_id)["plan"] for job_id in jobs] == [["queued"], ["queued"]]
    assert not any("convert" in play.step_states(job_id) for job_id in jobs)
    kinds = upgraded.run_all()
    assert [play.job(job_id)["state"] for job_id in jobs] == ["succeeded", "succeeded"]
    assert kinds.count("plan") == 2
    assert kinds.count("convert") == 1
    assert "fetch" not in kinds, "the checkpoint is kept"
    revisions = play.database.read(
        lambda connection: connection.execute(select(Step.state, Step.revision).where(Step.kind == "convert")).all()
    )
    assert sorted(map(tuple, revisions)) == [("cancelled", "a"), ("succeeded", "b")]


def test_nothing_is_planned_anew_while_a_worker_with_the_tools_was_heard_of(play: Play) -> None:
    job_id = play.submit()
    plan(play)
    upgraded = Upgraded(play)
    fleet.beat_worker(play.database, play.worker_id)
    fleet.end_worker(play.database, play.worker_id)
    assert upgraded.claim("convert") is None
    assert play.step_states(job_id)["convert"] == ["queued"]


def test_a_fleet_that_stays_mixed_is_told_in_the_end(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replan, "_MOST_PLANS", 3)
    job_id = play.submit()
    plan(play)
    upgraded = Upgraded(play)
    pauses = 0
    while (orphan := upgraded.claim("convert")) is None:
        waiting = play.database.read(
            lambda connection: connection.execute(select(Step.run_after).where(Step.state == "queued")).scalar_one()
        )
        pauses += waiting is not None
        forget_pauses(play)
        claim = upgraded.claim("light")
        assert claim
        assert claim.kind == "plan"
        # Whoever plans still has the old tools.
        upgraded.finish(claim, Toolchain({"converter": "1"}, {"convert": "a", "quantize": "a"}))
    assert pauses == 2, "the first new plan does not wait, the others do"
    assert (orphan.kind, orphan.revision) == ("convert", "a")
    play.fail(orphan, ToolchainChanged("The runner says so."))
    assert play.job(job_id)["state"] == "failed"
