"""Holders whose lease has run out, raced against those who take over, at every door of the ledger.

Every step of a job is raced for. Either the two meet at the takeover (the old holder finishes while the new one claims:
one of them may win), or the new one holds already (then nothing that the old one writes may be accepted). They start
together, or one goes ahead, as the seed says.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from service.errors import LeaseLost, SourceNotFound, SourceUnavailable
from service.ledger import claims, fleet, moves, publications, results
from service.ledger.database import Database
from service.ledger.keys import digest_json
from tests.chaos import scale
from tests.ledger_invariants import find_violations, read_ledger
from tests.ledger_play import EXPIRED, POLICY, Play, outputs_of

#: What an old holder may try, besides finishing.
_DOORS: dict[str, Callable[[Play, claims.Claim], object]] = {
    "finish": lambda play, claim: finish(play, claim),
    "fail": lambda play, claim: play.fail(claim, SourceNotFound("There is no such folder.")),
    "try again": lambda play, claim: play.fail(claim, SourceUnavailable("The hub is away.")),
    "release": lambda play, claim: claims.release_step(play.database, claim),
    "heartbeat": lambda play, claim: claims.extend_lease(play.database, claim, POLICY.lease_s),
    "progress": lambda play, claim: claims.report_progress(play.database, claim, "still at it", 0.5),
    "pin": lambda play, claim: claims.pin_attempt(play.database, claim),
    "record": lambda play, claim: record(play, claim),
}


def finish(play: Play, claim: claims.Claim) -> None:
    """Do what a worker does at the end of a step."""
    if claim.kind == "publish":
        record(play, claim)
    play.finish(claim)


def record(play: Play, claim: claims.Claim) -> None:
    """Record what a publish is about to publish; any other step has nothing to record and finishes."""
    if claim.kind != "publish":
        play.finish(claim)
        return
    (output,) = claim.inputs["artifact_tflite"].outputs
    manifest_digest = digest_json([claim.step_id, claim.token])
    draft = publications.Draft("tflite", "model.tflite", output.digest, output.size_bytes, manifest_digest, "{}")
    publications.record_publications(play.database, claim, [draft])


class Track:
    """Runs job after job on one ledger, with a race for every step."""

    def __init__(self, database: Database, seed: int) -> None:
        self.play = Play(database)
        self.heir_id = self.play.add_worker("host-b")
        self.random = random.Random(seed)
        self.tally: Counter[str] = Counter()
        self.stored: set[str] = set()
        self._pool = ThreadPoolExecutor(2)

    def run(self, races: int, *, is_fenced: bool = True) -> Counter[str]:
        """Race until there have been so many; unfenced jobs end as they may."""
        with self._pool:
            while self.tally["races"] < races:
                for worker_id in (self.play.worker_id, self.heir_id):
                    fleet.beat_worker(self.play.database, worker_id)
                path = f"/models/{self.tally['jobs']}"
                job_id = self.play.submit(path, recipes=["none"], formats=["tflite"])
                self.tally["jobs"] += 1
                while (zombie := self.play.claim(policy=EXPIRED)) is not None:
                    self.stored.update(output.digest for output in outputs_of(zombie))
                    self._race(zombie)
                if is_fenced:
                    assert self.play.job(job_id)["state"] == "succeeded"
        return self.tally

    def _race(self, zombie: claims.Claim) -> None:
        self.tally["races"] += 1
        if self.random.random() < 0.3:
            heir, accepted, refused = self._meet(zombie, "finish", lambda: self._take_over(zombie))
        else:
            held = self._take_over(zombie)
            assert held is not None
            heir, accepted, refused = self._meet(zombie, self.random.choice(list(_DOORS)), lambda: held)
        if heir is None:
            assert accepted, "nobody has done the step"
            self.tally["before the takeover"] += 1
        elif accepted or refused:
            self.tally["stale commits"] += 1
        else:
            self.tally["refused"] += 1

    def _take_over(self, zombie: claims.Claim) -> claims.Claim | None:
        """Claim what the zombie held; another step that has become due meanwhile is given back."""
        heir = self.play.claim(zombie.resource_class, worker_id=self.heir_id)
        if heir is not None and heir.step_id != zombie.step_id:
            claims.release_step(self.play.database, heir)
            return None
        return heir

    def _meet(
        self, zombie: claims.Claim, door: str, take: Callable[[], claims.Claim | None]
    ) -> tuple[claims.Claim | None, bool, bool]:
        """Let both act; return the heir's claim, whether the zombie was accepted, and whether the heir was refused."""
        start = threading.Barrier(2)

        def act_as_zombie() -> bool:
            start.wait()
            # A release says nothing; when it is accepted the heir is refused.
            return is_accepted(lambda: _DOORS[door](self.play, zombie)) and door != "release"

        def act_as_heir() -> tuple[claims.Claim | None, bool]:
            start.wait()
            heir = take()
            return heir, heir is not None and not is_accepted(lambda: finish(self.play, heir))

        lead = self.random.choice(["nobody", "zombie", "heir"])
        if lead != "nobody":
            start = threading.Barrier(1)
        actors = [act_as_heir, act_as_zombie] if lead == "heir" else [act_as_zombie, act_as_heir]
        futures = {}
        for actor in actors:
            futures[actor] = self._pool.submit(actor)
            if lead != "nobody":
                futures[actor].exception()
        heir, refused = futures[act_as_heir].result()
        return heir, futures[act_as_zombie].result(), refused


def is_accepted(write: Callable[[], object]) -> bool:
    """Whether the ledger takes a write."""
    try:
        write()
    except LeaseLost:
        return False
    return True


def test_a_holder_whose_lease_has_run_out_commits_nothing_against_the_next(
    database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    track = Track(database, scale.SEED)
    tally = track.run(scale.RACES // 2)
    with capsys.disabled():
        print(f"\n{database.engine.dialect.name}, seed {scale.SEED}: {dict(tally)}")
    assert tally["stale commits"] == 0
    assert find_violations(read_ledger(database), track.stored) == []
    assert min(tally["before the takeover"], tally["refused"]) > 0


def test_control_without_the_fence_stale_commits_are_seen(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    fenced = moves.move_step

    def unfenced(*args: Any, token: int | None = None, **values: Any) -> bool:
        return fenced(*args, **values)

    for module in (results, claims):
        monkeypatch.setattr(module, "move_step", unfenced)
    assert Track(database, scale.SEED).run(40, is_fenced=False)["stale commits"] > 0
