"""A state machine that plays users, workers and the sweep against one ledger, in any order that Hypothesis thinks of.

Owns the model: who was handed which claim, which of them have ended, what bytes the played store has. The ledger is
used through its public doors alone, and judged after every move by `tests.ledger_invariants`. Nothing here waits: a
lease ends because its holder lets it (`extend_lease` into the past). Run by `test_ledger_machine`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from service.errors import (
    BlobMissing,
    ChildCrashed,
    Conflict,
    EdgeKilnError,
    LeaseLost,
    SourceNotFound,
    SourceUnavailable,
)
from service.ledger import benchmarks, claims, fleet, housekeeping, jobs, publications, results, sweep
from service.ledger.base import Base
from service.ledger.blobs import Reprieves, commit_uploaded
from service.ledger.database import Database, Transaction
from service.ledger.keys import digest_json
from service.ledger.states import StepState
from service.ledger.tables import Publication, Step
from service.requests import BenchmarkRequest
from tests.kiln import read_rows
from tests.ledger_invariants import LedgerRows, find_violations, read_ledger
from tests.ledger_play import BENCHMARK, CLASSES, TENANT, TOOLCHAIN, Play, figures_of, outputs_of

#: No lease ends by itself, however slow the machine; two failures and three losses are enough to see their ends.
POLICY = claims.LeasePolicy(lease_s=3600, benchmark_patience_s=3600, max_failures=2, max_losses=3, retry_pause_s=0)
_STRANGER = "stranger"
_ERRORS: tuple[EdgeKilnError, ...] = (
    SourceNotFound("There is no such folder."),
    SourceUnavailable("The hub is away."),
    ChildCrashed("The child was killed by SIGSEGV."),
)
#: Some of many: the machine takes it modulo what there is.
_SOME = st.integers(0, 7)


class LedgerMachine(RuleBasedStateMachine):
    """One history of one ledger, which it empties first."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        self.database = database
        empty(database)
        self.plays = {
            tenant: Play(database, tenant, host) for tenant, host in ((TENANT, "host-a"), (_STRANGER, "host-b"))
        }
        self.workers = [play.worker_id for play in self.plays.values()]
        self.jobs: list[tuple[str, str]] = []
        self.claims: list[claims.Claim] = []
        #: Step -> token of the claim that was handed out last and has not ended.
        self.held: dict[str, int] = {}
        self.expired: set[str] = set()
        self.tokens: dict[str, int] = {}
        #: Digests whose bytes the played store has; what was lost is nobody's fault but the test's.
        self.stored: set[str] = set()
        self.lost: set[str] = set()

    # --- users -----------------------------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        self.submit(0, False, False, False, 0)

    @rule(path=st.integers(0, 1), both=st.booleans(), measured=st.booleans(), strange=st.booleans(), priority=_SOME)
    def submit(self, path: int, both: bool, measured: bool, strange: bool, priority: int) -> None:
        tenant = _STRANGER if strange else TENANT
        request: dict[str, Any] = {"recipes": ["none", "dynamic_int8"] if both else ["dynamic_int8"]}
        request |= {"formats": ["tflite"], "devices": ["host"] if measured else [], "priority": priority}
        self.jobs.append((tenant, self.plays[tenant].submit(f"/models/{path}", **request)))

    @rule(which=_SOME)
    def measure(self, which: int) -> None:
        """Ask for a benchmark of what was published before."""
        published = [row for row in read_rows(self.database, Publication) if row["published_at"] is not None]
        if published:
            row = published[which % len(published)]
            asked = BenchmarkRequest(devices=("host",))
            made = benchmarks.submit_benchmark(self.database, row["tenant_id"], row["id"], asked, processes=1)
            self.jobs.append((row["tenant_id"], made.job_id))

    @rule(which=_SOME)
    def cancel(self, which: int) -> None:
        tenant, job_id = self.jobs[which % len(self.jobs)]
        try:
            jobs.cancel_job(self.database, tenant, job_id)
        except Conflict:
            return
        self._forget_cancelled()

    @rule(which=_SOME)
    def retry(self, which: int) -> None:
        tenant, job_id = self.jobs[which % len(self.jobs)]
        try:
            jobs.retry_job(self.database, tenant, job_id)
        except Conflict:
            return

    # --- workers ---------------------------------------------------------------------------------

    @rule(resource_class=st.sampled_from(CLASSES), who=st.integers(0, 1))
    def claim(self, resource_class: str, who: int) -> None:
        self._claim(resource_class, who)

    @rule(resource_class=st.sampled_from(CLASSES), who=st.integers(0, 1), count=st.integers(1, 6))
    def work(self, resource_class: str, who: int, count: int) -> None:
        """Workers mostly do their work: without this few histories come far."""
        for _ in range(count):
            claim = self._claim(resource_class, who)
            if claim is None:
                return
            self._act(claim, self._finish, ends=True)

    @rule(which=_SOME)
    def finish(self, which: int) -> None:
        self._pick(which, self._finish, ends=True)

    @rule(which=_SOME, how=st.integers(0, len(_ERRORS) - 1))
    def fail(self, which: int, how: int) -> None:
        self._pick(which, lambda claim: self._fail(claim, _ERRORS[how]), ends=True)

    @rule(which=_SOME)
    def release(self, which: int) -> None:
        def act(claim: claims.Claim) -> None:
            is_held = claims.is_held(self.database, claim)
            claims.release_step(self.database, claim)
            if not is_held:
                raise LeaseLost("A release says nothing of it.")

        self._pick(which, act, ends=True)

    @rule(which=_SOME)
    def heartbeat(self, which: int) -> None:
        def act(claim: claims.Claim) -> None:
            claims.extend_lease(self.database, claim, POLICY.lease_s)
            self.expired.discard(claim.step_id)

        self._pick(which, act)

    @rule(which=_SOME)
    def expire(self, which: int) -> None:
        """The holder falls silent; it does not know, and may come back."""

        def act(claim: claims.Claim) -> None:
            claims.extend_lease(self.database, claim, -1)
            self.expired.add(claim.step_id)

        self._pick(which, act)

    @rule(resource_class=st.sampled_from(CLASSES), who=st.integers(0, 1))
    def overtake(self, resource_class: str, who: int) -> None:
        """A holder falls silent, another comes for its step, and it finishes all the same."""
        old = self._claim(resource_class, who)
        if old is not None:
            claims.extend_lease(self.database, old, -1)
            self.expired.add(old.step_id)
            self._claim(resource_class, 1 - who)
            self._act(old, self._finish, ends=True)

    @rule(which=_SOME)
    def report(self, which: int) -> None:
        self._pick(which, lambda claim: claims.report_progress(self.database, claim, "at it", 0.5))

    @rule(which=_SOME)
    def pin(self, which: int) -> None:
        measured = [claim for claim in self.claims if claim.kind == "benchmark"]
        if measured:
            self._act(measured[which % len(measured)], lambda claim: claims.pin_attempt(self.database, claim))

    @rule(which=_SOME)
    def record(self, which: int) -> None:
        """A publish that crashes after its rows."""
        publishing = [claim for claim in self.claims if claim.kind == "publish"]
        if publishing:
            self._act(publishing[which % len(publishing)], self._record)

    @rule(which=_SOME)
    def lose_bytes(self, which: int) -> None:
        """The store loses what a step reads; the step's worker finds it out."""

        def act(claim: claims.Claim) -> None:
            supplier = next(found for found in claim.inputs.values() if found.outputs)
            for output in supplier.outputs:
                self.stored.discard(output.digest)
                self.lost.add(output.digest)
            results.retire_step(self.database, supplier.step_id)
            self._fail(claim, BlobMissing("The store has no such object."))

        readers = [
            claim
            for claim in self.claims
            if claim.step_id in self.held and any(found.outputs for found in claim.inputs.values())
        ]
        if readers and claims.is_held(self.database, readers[which % len(readers)]):
            self._act(readers[which % len(readers)], act, ends=True)

    # --- the sweeps ------------------------------------------------------------------------------

    @rule()
    def end_hopeless(self) -> None:
        claims.end_hopeless_steps(self.database, POLICY)

    @rule()
    def condemn(self) -> None:
        sweep.retire_unused_steps(self.database, 0)
        sweep.condemn_unreferenced(self.database)

    @rule()
    def delete(self) -> None:
        for row in list(sweep.read_due(self.database, 0)):
            sweep.delete_condemned(self.database, row.digest, 0, lambda gone=row.digest: self.stored.discard(gone))

    @rule()
    def prune(self) -> None:
        housekeeping.prune(self.database)

    # --- what must hold --------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        rows = read_ledger(self.database)
        assert find_violations(rows, self.stored | self.lost) == []
        for step in rows["steps"]:
            # A holder loses its step by what it does itself, after its lease, or to a cancellation.
            if step["state"] == StepState.RUNNING:
                assert self.held.get(step["id"]) == step["token"], "somebody runs it who was never told"
            elif step["id"] in self.held:
                assert step["id"] in self.expired, f"its holder has lost {step['kind']} {step['id']} without a reason"
                del self.held[step["id"]]

    def teardown(self) -> None:
        """Whatever has happened: when silent holders are given up and workers work, every job ends."""
        if sys.exception() is not None:
            # What was found must not be hidden by what follows from it.
            return
        for claim in self.claims:
            if self.held.get(claim.step_id) == claim.token and claims.is_held(self.database, claim):
                claims.extend_lease(self.database, claim, -1)
                self.expired.add(claim.step_id)
        while any(self._work_off(resource_class, who) for resource_class in CLASSES for who in (0, 1)):
            pass
        self.holds()
        assert [job["state"] for job in read_ledger(self.database)["jobs"] if job["finalized_at"] is None] == []
        assert claims.due_classes(self.database) == []

    def _work_off(self, resource_class: str, who: int) -> bool:
        claim = self._claim(resource_class, who)
        if claim is not None:
            self._act(claim, self._finish, ends=True)
        return claim is not None

    # --- how it is done --------------------------------------------------------------------------

    def _claim(self, resource_class: str, who: int) -> claims.Claim | None:
        fleet.beat_worker(self.database, self.workers[who])
        claim = claims.claim_next(self.database, self.workers[who], resource_class, POLICY)
        if claim is not None:
            step_id = claim.step_id
            assert claim.token == self.tokens.get(step_id, 0) + 1, "a token skips or goes back"
            assert step_id not in self.held or step_id in self.expired, "a live lease is nobody else's"
            self.tokens[step_id] = self.held[step_id] = claim.token
            self.expired.discard(step_id)
            self.claims.append(claim)
        return claim

    def _pick(self, which: int, act: Callable[[claims.Claim], object], *, ends: bool = False) -> None:
        """Let one of the latest holders act, whether it still holds or not."""
        if self.claims:
            self._act(self.claims[-1 - which % len(self.claims)], act, ends=ends)

    def _act(self, claim: claims.Claim, act: Callable[[claims.Claim], object], *, ends: bool = False) -> None:
        is_holder = self.held.get(claim.step_id) == claim.token
        before = None if is_holder else read_ledger(self.database)
        try:
            act(claim)
        except LeaseLost:
            if before is not None:
                assert_same(before, read_ledger(self.database))
                return
            (step,) = read_rows(self.database, Step, Step.id == claim.step_id)
            assert step["state"] != StepState.RUNNING, f"a holder is refused: {claim.kind} {claim.step_id}"
            return
        assert is_holder, f"a stale holder of {claim.kind} {claim.step_id} has written under token {claim.token}"
        if ends:
            del self.held[claim.step_id]
            self.expired.discard(claim.step_id)

    def _finish(self, claim: claims.Claim) -> None:
        outputs = outputs_of(claim)
        if claim.kind == "publish":
            self._record(claim)

        def upload(digests: Any) -> None:
            self.stored.update(digests)
            self.lost.difference_update(digests)

        def commit(reprieves: Reprieves) -> None:
            success = results.Success(figures_of(claim), outputs, reprieves=reprieves)
            results.finish_step(self.database, claim, success, TOOLCHAIN, BENCHMARK)

        upload([output.digest for output in outputs])
        commit_uploaded(self.database, commit, upload)

    def _fail(self, claim: claims.Claim, error: EdgeKilnError) -> None:
        results.fail_step(self.database, claim, error, results.Usage(), POLICY)

    def _record(self, claim: claims.Claim) -> None:
        """Record manifests that tell of the attempt: the first one recorded must stay in force."""
        drafts = []
        for kind in claim.params["formats"]:
            (output,) = claim.inputs[f"artifact_{kind}"].outputs
            manifest = f'{{"attempt": {claim.token}}}'
            digest = digest_json([claim.step_id, kind, claim.token])
            drafts.append(publications.Draft(kind, f"model.{kind}", output.digest, 10, digest, manifest))
        recorded = {
            row["kind"]: row["manifest_digest"]
            for row in read_ledger(self.database)["publications"]
            if row["step_id"] == claim.step_id
        }
        for draft in publications.record_publications(self.database, claim, drafts):
            assert draft.manifest_digest == recorded.get(draft.kind, draft.manifest_digest)

    def _forget_cancelled(self) -> None:
        for step in read_rows(self.database, Step, Step.state == StepState.CANCELLED):
            self.held.pop(step["id"], None)
            self.expired.discard(step["id"])


def empty(database: Database) -> None:
    """Delete every row."""

    def delete(tx: Transaction) -> None:
        for table in reversed(Base.metadata.sorted_tables):
            tx.connection.execute(table.delete())

    database.write(delete)


def assert_same(before: LedgerRows, after: LedgerRows) -> None:
    """Assert that a refused write has changed nothing."""
    changed = [name for name in before.tables if before[name] != after[name]]
    assert not changed, f"a refused write has changed {changed}"
