"""What a variant's and a job's state is, given the states of their steps. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.errors import GateRefused
from service.ledger.states import (
    FINAL_STEP_STATES,
    FINAL_VARIANT_STATES,
    JobState,
    StepState,
    VariantState,
)


@dataclass(frozen=True)
class StepView:
    """The part of a linked step that decides states."""

    kind: str
    state: str
    error: Mapping[str, Any] | None
    #: A worker has claimed it for this job's sake.
    is_started: bool
    #: Ids of the variants it serves; empty when it serves the whole job.
    variant_ids: frozenset[str]


def judge_variant(variant_id: str, steps: Sequence[StepView]) -> tuple[VariantState, Mapping[str, Any] | None]:
    """Return a variant's state and, when it did not succeed, the error at the root.

    Benchmarks do not decide: a publication waits for one only through the graph, when a gate names its figure. In a job
    that only measures they alone do.
    """
    prelude = [step for step in steps if not step.variant_ids]
    served = [step for step in steps if variant_id in step.variant_ids]
    if _only_measures(steps):
        return _judge_measured(served)
    own = [step for step in served if step.kind != "benchmark"]
    own_error = _root_error(own)
    if own_error and not any(step.state == StepState.FAILED for step in own):
        # Only consequences so far: the root is a benchmark that a gate waits for.
        own_error = _root_error(served)
    failure = _root_error(prelude) or own_error
    has_started = any(step.is_started or step.state in FINAL_STEP_STATES for step in own)
    is_planned = any(step.kind == "publish" for step in own)
    if (not is_planned and not failure) or any(step.state not in FINAL_STEP_STATES for step in own):
        return (VariantState.RUNNING if has_started else VariantState.PENDING), None
    if failure is None:
        return VariantState.SUCCEEDED, None
    is_refusal = failure.get("code") == GateRefused.code
    return (VariantState.REFUSED if is_refusal else VariantState.FAILED), failure


def _only_measures(steps: Sequence[StepView]) -> bool:
    """Whether a job measures what was published before: it has no source to resolve, nor any other prelude."""
    return bool(steps) and all(step.variant_ids for step in steps)


def _judge_measured(served: Sequence[StepView]) -> tuple[VariantState, Mapping[str, Any] | None]:
    """Succeeded with one measurement; the job says whether all were made."""
    benchmarks = [step for step in served if step.kind == "benchmark"]
    if any(step.state not in FINAL_STEP_STATES for step in benchmarks):
        has_started = any(step.is_started or step.state in FINAL_STEP_STATES for step in benchmarks)
        return (VariantState.RUNNING if has_started else VariantState.PENDING), None
    if any(step.state == StepState.SUCCEEDED for step in benchmarks):
        return VariantState.SUCCEEDED, None
    return VariantState.FAILED, _root_error(benchmarks)


def judge_job(variant_states: Sequence[str], steps: Sequence[StepView]) -> JobState:
    """Return a job's state from its variants and steps."""
    if any(state not in FINAL_VARIANT_STATES for state in variant_states) or any(
        step.state not in FINAL_STEP_STATES for step in steps
    ):
        # What a job measures was made before it; with its first benchmark it begins.
        own = [step for step in steps if step.kind == "benchmark"] if _only_measures(steps) else steps
        has_started = any(step.is_started or step.state in FINAL_STEP_STATES for step in own)
        return JobState.RUNNING if has_started else JobState.QUEUED
    succeeded = sum(state == VariantState.SUCCEEDED for state in variant_states)
    if succeeded == 0:
        return JobState.FAILED
    # One that succeeded with an error has measured some of its arms.
    is_measured = all(
        step.state == StepState.SUCCEEDED and step.error is None for step in steps if step.kind == "benchmark"
    )
    return JobState.SUCCEEDED if succeeded == len(variant_states) and is_measured else JobState.PARTIAL


def _root_error(steps: Iterable[StepView]) -> Mapping[str, Any] | None:
    """The first failure that is nobody else's consequence."""
    failed = [step for step in steps if step.state in (StepState.FAILED, StepState.CANCELLED)]
    failed.sort(key=lambda step: step.state != StepState.FAILED)
    for step in failed:
        return step.error or {"code": "cancelled", "message": "Cancelled.", "retryable": False, "details": {}}
    return None
