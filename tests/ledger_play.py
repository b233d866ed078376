"""Plays the user and the workers against a ledger, without any real work being done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.errors import EdgeKilnError
from service.ledger import access, claims, fleet, jobs, results, views
from service.ledger.blobs import OutputFile
from service.ledger.database import Database
from service.ledger.keys import Toolchain, digest_json
from service.ledger.plan import RESOURCE_CLASSES
from service.requests import parse_request

TENANT = "default"
TOOLCHAIN = Toolchain(versions={"converter": "1"}, revisions={"convert": "a", "quantize": "a"})
POLICY = claims.LeasePolicy(lease_s=30, benchmark_patience_s=60, max_failures=3, max_losses=10, retry_pause_s=0)
#: A lease that has run out before anyone can look.
EXPIRED = claims.LeasePolicy(lease_s=-1, benchmark_patience_s=60, max_failures=3, max_losses=10, retry_pause_s=0)
CLASSES = ("fetch", "convert", "light", "device")
SLOTS = {"fetch": 2, "convert": 2, "light": 9, "device": 1}
BENCHMARK = {"processes": 1, "threads": 1}


class Play:
    """One ledger, one worker, and figures that let every step succeed."""

    def __init__(self, database: Database, tenant_id: str = TENANT, host: str = "host-a") -> None:
        self.database = database
        self.tenant_id = tenant_id
        access.ensure_tenant(database, tenant_id)
        self.worker_id = self.add_worker(host)

    def add_worker(
        self, host: str = "host-a", slots: dict[str, int] | None = None, memory_limit_bytes: int = 100
    ) -> str:
        return fleet.register_worker(
            self.database,
            host,
            cores=2,
            memory_bytes=120,
            memory_limit_bytes=memory_limit_bytes,
            slots=slots or SLOTS,
            toolchain=TOOLCHAIN,
            isolation={"isolation": "strong"},
        )

    def submit(self, path: str = "/models/tiny", **fields: Any) -> str:
        document = {"source": {"kind": "folder", "path": path}, "recipes": ["none", "dynamic_int8"], **fields}
        return jobs.submit_job(self.database, self.tenant_id, parse_request(document), max_variants=256).job_id

    def job(self, job_id: str) -> dict[str, Any]:
        return views.read_job(self.database, self.tenant_id, job_id)

    def step_states(self, job_id: str) -> dict[str, list[str]]:
        states: dict[str, list[str]] = {}
        for step in self.job(job_id)["steps"]:
            states.setdefault(step["kind"], []).append(step["state"])
        return states

    def claim(
        self,
        *classes: str,
        policy: claims.LeasePolicy = POLICY,
        worker_id: str | None = None,
    ) -> claims.Claim | None:
        for resource_class in classes or CLASSES:
            claim = claims.claim_next(self.database, worker_id or self.worker_id, resource_class, policy)
            if claim is not None:
                return claim
        return None

    def claim_kind(self, kind: str, policy: claims.LeasePolicy = POLICY) -> claims.Claim:
        """Finish steps until one of `kind` is claimed."""
        while True:
            claim = self.claim(policy=policy)
            assert claim is not None, f"no {kind} step became due"
            if claim.kind == kind:
                return claim
            self.finish(claim)

    def claim_kind_only(self, kind: str) -> claims.Claim:
        """Claim a due step of `kind` and give back whatever comes before it."""
        passed = []
        while True:
            claim = self.claim(RESOURCE_CLASSES[kind])
            assert claim is not None, f"no {kind} step is due"
            if claim.kind == kind:
                break
            passed.append(claim)
        for other in passed:
            claims.release_step(self.database, other)
        return claim

    def finish(self, claim: claims.Claim, outputs: Sequence[OutputFile] | None = None, **figures: Any) -> None:
        found = {**figures_of(claim), **figures}
        success = results.Success(found, outputs if outputs is not None else outputs_of(claim))
        results.finish_step(self.database, claim, success, TOOLCHAIN, BENCHMARK)

    def fail(self, claim: claims.Claim, error: EdgeKilnError) -> bool:
        return results.fail_step(self.database, claim, error, results.Usage(), POLICY)

    def run_all(self) -> list[str]:
        """Run whatever is due until nothing is; return the kinds in order."""
        kinds = []
        while (claim := self.claim()) is not None:
            kinds.append(claim.kind)
            self.finish(claim)
        return kinds


def figures_of(claim: claims.Claim) -> dict[str, Any]:
    """What the real step would find, as far as the ledger reads it."""
    if claim.kind == "resolve":
        return {"source": {**claim.params["source"], "revision": "pinned"}}
    if claim.kind == "fetch":
        return {"checkpoint_digest": digest_json(claim.params), "files": []}
    if claim.kind == "plan":
        engines = {name: "reauthored" if name == "auto" else name for name in claim.params["engines"]}
        return {"engines": engines, "prefill_lengths": [8], "context_length": 64}
    return {"kind": claim.kind}


def outputs_of(claim: claims.Claim) -> list[OutputFile]:
    """One file of its own for every step that makes one."""
    if claim.kind not in ("fetch", "convert", "quantize", "bundle"):
        return []
    return [OutputFile("model.bin", digest_json([claim.key, "bytes"]), 10)]
