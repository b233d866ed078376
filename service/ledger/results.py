"""Results: what an attempt at a step yields, and what follows from it.

Called by `workers.runner` only. Each function is one transaction, fenced by the claim's token: when the lease was lost,
`LeaseLost` is raised and nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import insert, select, update

from service.devices import find_failed_arm
from service.errors import BlobCondemned, ChildCrashed, DeviceHung, DeviceLost, EdgeKilnError, LeaseLost, Parked
from service.ledger import locks
from service.ledger.blobs import OutputFile, Reprieves, commit_blobs
from service.ledger.claims import Claim, LeasePolicy
from service.ledger.clock import now
from service.ledger.database import Transaction, writes
from service.ledger.devices import name_devices
from service.ledger.events import emit
from service.ledger.graph import ReusedStep, add_steps
from service.ledger.keys import Toolchain
from service.ledger.moves import close_attempt, move_step, settle
from service.ledger.plan import StepSpec, expand_planned, expand_resolved
from service.ledger.states import FINAL_VARIANT_STATES, AttemptState, StepEvent, StepState
from service.ledger.tables import (
    Attempt,
    Job,
    JobStep,
    Publication,
    Step,
    StepInput,
    StepOutput,
    Variant,
    VariantStep,
)
from service.requests import parse_stored_request


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
    #: Of outputs that were uploaded again because a commit had refused them.
    reprieves: Reprieves = field(default_factory=dict)
    #: What a benchmark found slower or larger than the one before it, as `service.difference` describes it.
    regressions: Sequence[Mapping[str, Any]] = ()


@writes
def finish_step(
    tx: Transaction, claim: Claim, success: Success, toolchain: Toolchain, benchmark: Mapping[str, Any]
) -> Sequence[ReusedStep]:
    """Commit a step's outputs and figures, and everything that follows; outputs are in the store already.

    Returns the steps of the plan that follows which others had made, or are making.

    `toolchain` and `benchmark` enter the steps that a `resolve` or `plan` brings about. Raises `LeaseLost`, and
    `BlobCondemned` when an output is about to be swept and must be uploaded again.
    """
    locks.lock_step_with_jobs(tx, claim.step_id)
    if not move_step(
        tx,
        claim.step_id,
        StepEvent.SUCCEED,
        token=claim.token,
        figures=dict(success.figures),
        loss_count=0,
        progress=None,
        # Of several arms, some may have failed: what the others measured stands beside why.
        error=find_failed_arm(success.figures) if claim.kind == "benchmark" else None,
    ):
        raise LeaseLost(f"The {claim.kind} step {claim.step_id} is no longer held by this worker.")
    commit_blobs(tx, success.outputs, success.reprieves)
    for output in success.outputs:
        tx.connection.execute(
            insert(StepOutput).values(
                step_id=claim.step_id, name=output.name, digest=output.digest, size_bytes=output.size_bytes
            )
        )
    close_attempt(tx, claim.step_id, claim.token, AttemptState.SUCCEEDED, **_usage_values(tx, success.usage))
    if claim.kind == "publish":
        tx.connection.execute(
            update(Publication).where(Publication.step_id == claim.step_id).values(published_at=now())
        )
    for regression in success.regressions:
        emit(tx, filter(None, [claim.job_id]), "regression", {"step_id": claim.step_id, **regression})
    reused = _expand(tx, claim, success.figures, toolchain, benchmark)
    settle(tx, claim.step_id)
    return reused


def _expand(
    tx: Transaction, claim: Claim, figures: Mapping[str, Any], toolchain: Toolchain, benchmark: Mapping[str, Any]
) -> Sequence[ReusedStep]:
    """Write the part of the job's graph that a finished `resolve` or `plan` makes known."""
    if claim.kind not in ("resolve", "plan") or claim.job_id is None:
        return ()
    job_id = claim.job_id
    request = parse_stored_request(tx.connection.execute(select(Job.request).where(Job.id == job_id)).scalar_one())
    if claim.kind == "resolve":
        tx.connection.execute(update(Job).where(Job.id == job_id).values(source=dict(figures["source"])))
        return add_steps(tx, job_id, expand_resolved(request, figures["source"]), toolchain, {}, None)
    fetch = claim.inputs["checkpoint"]
    open_variants = set(
        tx.connection.execute(
            select(Variant.name).where(Variant.job_id == job_id, Variant.state.not_in(FINAL_VARIANT_STATES))
        ).scalars()
    )
    for name, (asked, _) in request.variant_names.items():
        tx.connection.execute(
            update(Variant)
            .where(Variant.job_id == job_id, Variant.name == name)
            .values(engine=figures["engines"][asked])
        )
    planned = expand_planned(request, figures, benchmark, name_devices(tx.connection, request.devices))
    specs = _select_wanted(planned, open_variants, _unmeasured_variants(tx, job_id))
    return add_steps(tx, job_id, specs, toolchain, {"fetch": fetch.step_id}, fetch.figures["checkpoint_digest"])


def _unmeasured_variants(tx: Transaction, job_id: str) -> set[str]:
    """Names of variants whose benchmark a retry has set aside."""
    statement = (
        select(Variant.name)
        .join(VariantStep, VariantStep.variant_id == Variant.id)
        .join(Step, Step.id == VariantStep.step_id)
        .join(JobStep, JobStep.step_id == Step.id)
        .where(JobStep.job_id == job_id, Variant.job_id == job_id, JobStep.superseded, Step.kind == "benchmark")
    )
    return set(tx.connection.execute(statement).scalars())


def _select_wanted(specs: Sequence[StepSpec], open_variants: set[str], unmeasured: set[str]) -> list[StepSpec]:
    """Return the specs that serve an open variant or a missing measurement, with all that they need."""
    wanted: set[str] = set()
    for spec in reversed(specs):
        is_measurement = spec.kind == "benchmark" and not unmeasured.isdisjoint(spec.variants)
        if is_measurement or not open_variants.isdisjoint(spec.variants) or spec.name in wanted:
            wanted |= {spec.name, *spec.inputs.values()}
    return [spec for spec in specs if spec.name in wanted]


def _usage_values(tx: Transaction, usage: Usage) -> dict[str, Any]:
    return {
        "duration_s": usage.duration_s,
        "peak_rss_bytes": usage.peak_rss_bytes,
        "peak_anon_bytes": usage.peak_anon_bytes,
        "isolation": usage.isolation,
        "log_digest": _commit_log(tx, usage.log),
    }


def _commit_log(tx: Transaction, log: OutputFile | None) -> str | None:
    """Enter an attempt's log; a condemned one is left out, for no outcome may be lost with its log."""
    if log is None:
        return None
    try:
        commit_blobs(tx, [log])
    except BlobCondemned:
        return None
    return log.digest


@writes
def fail_step(tx: Transaction, claim: Claim, error: EdgeKilnError, usage: Usage, policy: LeasePolicy) -> bool:
    """Record a failed attempt; return whether the step will be tried again.

    A retryable error queues the step again after a pause, until it has failed `max_failures` times. Raises
    `LeaseLost`.
    """
    before = locks.lock_step_with_jobs(tx, claim.step_id).row
    document = error.to_json()
    is_retryable = bool(document["retryable"])
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
            parked = Parked(
                f"Given up after {failures} failed attempts. Last: {document['message']}", **document["details"]
            )
            document = parked.to_json()
        moved = move_step(tx, claim.step_id, StepEvent.FAIL, token=claim.token, failure_count=failures, error=document)
    if not moved:
        raise LeaseLost(f"The {claim.kind} step {claim.step_id} is no longer held by this worker.")
    # A phone that went away in the middle of a measurement: nothing is known of what it did.
    is_lost = before.pinned_at is not None and document["code"] in (DeviceLost.code, DeviceHung.code)
    how = AttemptState.LOST if is_lost else AttemptState.FAILED
    close_attempt(tx, claim.step_id, claim.token, how, error=error.to_json(), **_usage_values(tx, usage))
    settle(tx, claim.step_id)
    return tries_again


@writes
def record_usage(tx: Transaction, claim: Claim, usage: Usage) -> None:
    """Keep what a cancelled or lost attempt cost, and its log, which takes the place of its last words."""
    tx.connection.execute(
        update(Attempt)
        .where(Attempt.step_id == claim.step_id, Attempt.token == claim.token)
        .values(**_usage_values(tx, usage), live_log=None, live_log_bytes=None)
    )


@writes
def retire_step(tx: Transaction, step_id: str) -> None:
    """Let nobody join a succeeded step again whose blobs are gone or damaged, nor what was made from it.

    Made again, its bytes may differ in whatever the keys do not hold; what was proven of the old ones is no proof.
    """
    retired = {step_id}
    newest = [step_id]
    while newest:
        statement = select(StepInput.step_id).where(StepInput.input_id.in_(newest))
        newest = sorted(set(tx.connection.execute(statement).scalars()) - retired)
        retired.update(newest)
    tx.connection.execute(
        update(Step)
        .where(Step.id.in_(sorted(retired)), Step.shared, Step.state == StepState.SUCCEEDED)
        .values(retired_at=now())
    )
