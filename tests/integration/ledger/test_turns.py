"""Turns: no tenant's work keeps another's waiting, and priority orders a tenant's own steps alone."""

from __future__ import annotations

import pytest

from service.ledger import claims, due
from service.ledger.claims import Claim
from service.ledger.database import Database, Transaction
from tests.ledger_play import EXPIRED, Play

BATCH = 6


@pytest.fixture
def crowd(database: Database) -> Play:
    """A tenant whose batch was there first, with the highest priority."""
    play = Play(database, "crowd")
    for number in range(BATCH):
        play.submit(f"/models/{number}", priority=100)
    return play


@pytest.fixture
def single(crowd: Play) -> Play:
    """A tenant who comes later, with one job."""
    play = Play(crowd.database, "single", "host-b")
    play.submit("/models/mine", priority=-100)
    return play


def claim_one(play: Play, worker_id: str) -> Claim:
    claim = play.claim("fetch", worker_id=worker_id)
    assert claim
    return claim


def serve_one_by_one(play: Play, resource_class: str = "fetch") -> list[str]:
    """Finish all due steps of a class on one slot; return whose they were, in order."""
    worker_id = play.add_worker("one-slot", {resource_class: 1})
    served = []
    while (claim := play.claim(resource_class, worker_id=worker_id)) is not None:
        served.append(claim.tenant_id)
        play.finish(claim)
    return served


def test_on_one_slot_tenants_take_turns(crowd: Play, single: Play) -> None:
    served = serve_one_by_one(crowd)
    # `resolve`, then `fetch`: a turn each, between two of the batch.
    assert served[:4] == ["crowd", "single", "crowd", "single"]
    assert served.count("crowd") == 2 * BATCH


def test_control_oldest_first_starves_whoever_comes_later(
    crowd: Play, single: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_turns(tx: Transaction, resource_class: str) -> list[str]:
        return ["crowd", "single"]

    monkeypatch.setattr(due, "find_tenants_in_turn", without_turns)
    assert serve_one_by_one(crowd) == ["crowd"] * 2 * BATCH + ["single"] * 2


def test_a_free_slot_goes_to_whoever_has_fewest_running(crowd: Play) -> None:
    hosts = [crowd.add_worker(f"host-{number}", {"fetch": 3}) for number in range(2)]
    held = [claim_one(crowd, worker_id) for worker_id in hosts * 2]
    assert [claim.tenant_id for claim in held] == ["crowd"] * 4
    late = Play(crowd.database, "late", "host-c")
    for number in range(4):
        late.submit(f"/models/{number}")
    assert [claim_one(crowd, worker_id).tenant_id for worker_id in hosts] == ["late", "late"]
    # Four of the crowd's and two of the late one's run: a slot that the crowd gives back is not the crowd's again.
    crowd.finish(held[0])
    assert claim_one(crowd, hosts[0]).tenant_id == "late"


def test_a_tenant_alone_has_all_slots(crowd: Play) -> None:
    worker_id = crowd.add_worker("host-b", {"fetch": BATCH})
    assert all(claim_one(crowd, worker_id).tenant_id == "crowd" for _ in range(BATCH))


def test_steps_of_lost_workers_do_not_count_as_running(crowd: Play, single: Play) -> None:
    for number in range(2):
        assert crowd.claim("fetch", policy=EXPIRED, worker_id=crowd.add_worker(f"host-{number}"))
    # Each had a turn and neither has a live lease: the crowd, whose turn is longer ago, goes on.
    assert claim_one(crowd, crowd.add_worker("host-c")).tenant_id == "crowd"


def test_classes_have_turns_of_their_own(crowd: Play, single: Play) -> None:
    """Whoever fetches much is not served later when it converts."""
    serve_one_by_one(crowd)
    served = serve_one_by_one(crowd, "light")
    assert served[:3] == ["crowd", "single", "crowd"]


def test_within_a_tenant_priority_then_bundles_then_age(database: Database) -> None:
    play = Play(database)
    play.submit(recipes=["none", "dynamic_int8"], formats=["litertlm"])
    play.finish(play.claim_kind("quantize"))
    # A bundle is due, after a quantize that has waited longer.
    assert claims.due_classes(database) == ["light"]
    bundle = play.claim("light")
    assert bundle
    assert bundle.kind == "bundle"
    urgent = play.submit("/models/urgent", priority=1)
    claims.release_step(database, bundle)
    worker_id = play.add_worker("host-b")
    for _ in range(2):
        play.finish(claim_one(play, worker_id))
    claim = play.claim("light", worker_id=worker_id)
    assert claim
    assert (claim.kind, claim.job_id) == ("plan", urgent)


def test_a_joined_step_moves_up_with_the_most_urgent_job(database: Database) -> None:
    play = Play(database)
    play.submit("/models/a")
    play.submit("/models/b")
    worker_id = play.add_worker("host-b")
    for _ in range(4):
        play.finish(claim_one(play, worker_id))
    for _ in range(2):
        plan = play.claim("light", worker_id=worker_id)
        assert plan
        play.finish(plan)
    play.submit("/models/b", priority=7)
    play.finish(claim_one(play, worker_id))
    plan = play.claim("light", worker_id=worker_id)
    assert plan
    play.finish(plan)
    convert = play.claim("convert", worker_id=worker_id)
    assert convert
    (fetch,) = convert.inputs.values()
    assert fetch.params["source"]["path"] == "/models/b"
