"""Results: what an attempt at a step yields, and what follows from it.

Called by `workers.runner` only. Each function is one transaction, fenced by the claim's token: when the lease was lost,
`LeaseLost` is raised and nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import insert, select, update

from service.errors import BlobCondemned, ChildCrashed, EdgeKilnError, LeaseLost, Parked
from service.ledger import locks
from service.ledger.claims import Claim, LeasePolicy, OutputFile
from service.ledger.clock import now
from service.ledger.database import Transaction, writes
from service.ledger.graph import add_steps
from service.ledger.keys import Toolchain
from service.ledger.moves import close_attempt, move_step, settle
from service.ledger.plan import expand_planned, expand_resolved
from service.ledger.states import FINAL_VARIANT_STATES, AttemptState, StepEvent, StepState
from service.ledger.tables import (
    Attempt,
    Blob,
    Job,
    Publication,
    Step,
    StepOutput,
    Variant,
)
from service.requests import parse_request


@dataclass(frozen=True)
class Usage:
    """What an attempt cost."""

    duration_s: float | None = None
    peak_rss_bytes: int | None = None
    peak_anon_bytes: int | None = None
    isolation: str | None = None
    log: OutputFile | None = None


@dataclass(frozen=True)
class Success:
    """What an attempt yields."""

    figures: Mapping[str, Any]
    outputs: Sequence[OutputFile] = ()
    usage: Usage = field(default_factory=Usage)


@writes
def finish_step(
    tx: Transaction, claim: Claim, success: Success, toolchain: Toolchain, benchmark: Mapping[str, Any]
) -> None:
    """Commit a step's outputs and figures, and everything that follows; outputs are in the store already.

    `toolchain` and `benchmark` enter the steps that a `resolve` or `plan` brings about. Raises `LeaseLost`, and
    `BlobCondemned` when an output is about to be swept and must be uploaded again.
    """
    job_ids = locks.lock_step_with_jobs(tx, claim.step_id)
    if not move_step(
        tx,
        claim.step_id,
        StepEvent.SUCCEED,
        token=claim.token,
        figures=dict(success.figures),
        loss_count=0,
        progress=None,
        error=None,
    ):
        raise LeaseLost(f"The {claim.kind} step {claim.step_id} is no longer held by this worker.")
    log = [success.usage.log] if success.usage.log else []
    _commit_blobs(tx, [*success.outputs, *log])
    for output in success.outputs:
        tx.connection.execute(
            insert(StepOutput).values(
                step_id=claim.step_id, name=output.name, digest=output.digest, size_bytes=output.size_bytes
            )
        )
    close_attempt(tx, claim.step_id, claim.token, AttemptState.SUCCEEDED, **_usage_values(success.usage))
    if claim.kind == "publish":
        tx.connection.execute(
            update(Publication).where(Publication.step_id == claim.step_id).values(published_at=now())
        )
    if claim.job_id is not None:
        _expand(tx, claim, success.figures, toolchain, benchmark)
    settle(tx, claim.step_id, job_ids)


def _expand(
    tx: Transaction, claim: Claim, figures: Mapping[str, Any], toolchain: Toolchain, benchmark: Mapping[str, Any]
) -> None:
    """Write the part of the job's graph that a finished `resolve` or `plan` makes known."""
    if claim.kind not in ("resolve", "plan") or claim.job_id is None:
        return
    job_id = claim.job_id
    request = parse_request(tx.connection.execute(select(Job.request).where(Job.id == job_id)).scalar_one())
    if claim.kind == "resolve":
        tx.connection.execute(update(Job).where(Job.id == job_id).values(source=dict(figures["source"])))
        add_steps(tx, job_id, expand_resolved(request, figures["source"]), toolchain, {}, None)
        return
    fetch = claim.inputs["checkpoint"]
    open_variants = set(
        tx.connection.execute(
            select(Variant.name).where(Variant.job_id == job_id, Variant.state.not_in(FINAL_VARIANT_STATES))
        ).scalars()
    )
    for asked, engine in figures["engines"].items():
        tx.connection.execute(
            update(Variant).where(Variant.job_id == job_id, Variant.engine == asked).values(engine=engine)
        )
    specs = [spec for spec in expand_planned(request, figures, benchmark) if open_variants.intersection(spec.variants)]
    add_steps(tx, job_id, specs, toolchain, {"fetch": fetch.step_id}, fetch.figures["checkpoint_digest"])


def _commit_blobs(tx: Transaction, files: Sequence[OutputFile]) -> None:
    """Enter blobs that are in the store; refuse those that the sweep has condemned."""
    by_digest = {file.digest: file for file in files}
    for digest in sorted(by_digest):
        tx.connection.execute(
            tx.insert(Blob)
            .values(digest=digest, size_bytes=by_digest[digest].size_bytes, created_at=now())
            .on_conflict_do_nothing()
        )
    locks.lock_blobs(tx, by_digest)
    condemned = (
        tx.connection.execute(
            select(Blob.digest).where(Blob.digest.in_(sorted(by_digest)), Blob.condemned_at.is_not(None))
        )
        .scalars()
        .all()
    )
    if condemned:
        raise BlobCondemned("An output is about to be swept from the store; upload it again.", digests=list(condemned))


def _usage_values(usage: Usage) -> dict[str, Any]:
    return {
        "duration_s": usage.duration_s,
        "peak_rss_bytes": usage.peak_rss_bytes,
        "peak_anon_bytes": usage.peak_anon_bytes,
        "isolation": usage.isolation,
        "log_digest": usage.log.digest if usage.log else None,
    }


@writes
def fail_step(tx: Transaction, claim: Claim, error: EdgeKilnError, usage: Usage, policy: LeasePolicy) -> bool:
    """Record a failed attempt; return whether the step will be tried again.

    A retryable error queues the step again after a pause, until it has failed `max_failures` times. Raises
    `LeaseLost`.
    """
    job_ids = locks.lock_step_with_jobs(tx, claim.step_id)
    document = error.to_json()
    is_retryable = bool(document["retryable"])
    before = tx.connection.execute(select(Step.failure_count, Step.pinned_at).where(Step.id == claim.step_id)).one()
    failures = before.failure_count + 1
    tries_again = is_retryable and failures < policy.max_failures and before.pinned_at is None
    if tries_again:
        pause_s = policy.retry_pause_s * 2 ** (failures - 1)
        moved = move_step(
            tx,
            claim.step_id,
            StepEvent.RETRY_LATER,
            token=claim.token,
            failure_count=failures,
            loss_count=0,
            run_after=now(pause_s),
            error=document,
        )
    else:
        if document["code"] == ChildCrashed.code and failures >= policy.max_failures > 1:
            parked = Parked(f"Given up after {failures} crashes. Last: {document['message']}", **document["details"])
            document = parked.to_json()
        moved = move_step(tx, claim.step_id, StepEvent.FAIL, token=claim.token, failure_count=failures, error=document)
    if not moved:
        raise LeaseLost(f"The {claim.kind} step {claim.step_id} is no longer held by this worker.")
    _commit_blobs(tx, [usage.log] if usage.log else [])
    close_attempt(tx, claim.step_id, claim.token, AttemptState.FAILED, error=error.to_json(), **_usage_values(usage))
    settle(tx, claim.step_id, job_ids)
    return tries_again


@writes
def record_usage(tx: Transaction, claim: Claim, usage: Usage) -> None:
    """Keep what a cancelled or lost attempt cost, and its log; changes no state."""
    _commit_blobs(tx, [usage.log] if usage.log else [])
    tx.connection.execute(
        update(Attempt)
        .where(Attempt.step_id == claim.step_id, Attempt.token == claim.token)
        .values(**_usage_values(usage))
    )


@writes
def retire_step(tx: Transaction, step_id: str) -> None:
    """Let nobody join a succeeded step again: its blobs are gone or damaged."""
    locks.lock_step_with_jobs(tx, step_id)
    tx.connection.execute(
        update(Step).where(Step.id == step_id, Step.state == StepState.SUCCEEDED).values(retired_at=now())
    )
