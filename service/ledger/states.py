"""The states of steps, variants and jobs, and the one table of moves between step states.

Pure. `service.ledger.moves` is the only module that applies TRANSITIONS to rows.
"""

from __future__ import annotations

from enum import StrEnum


class StepState(StrEnum):
    """Where a step is. Each comment says who moves it on and what a crash does."""

    #: Inputs are missing. The finish of the last input moves it to `queued`; a failed input to `cancelled`.
    #: A crash changes nothing: the next finish looks again.
    WAITING = "waiting"
    #: Due, once `run_after` has passed. A worker's claim moves it to `running`. A lost message is repaired by
    #: the sweep.
    QUEUED = "queued"
    #: Held under a lease and a token. The holder finishes it; when the holder dies, the lease runs out and
    #: the next claim takes it over with a higher token.
    RUNNING = "running"
    #: Outputs and figures are in the ledger, blobs in the store. Final.
    SUCCEEDED = "succeeded"
    #: A typed error stands in the row. Final; a retry is a new step.
    FAILED = "failed"
    #: No live job wants it, or an input failed. Final; never joined.
    CANCELLED = "cancelled"


class StepEvent(StrEnum):
    """What can happen to a step."""

    INPUTS_READY = "inputs_ready"
    CLAIM = "claim"
    SUCCEED = "succeed"
    FAIL = "fail"
    RETRY_LATER = "retry_later"
    RELEASE = "release"
    INPUT_FAIL = "input_fail"
    CANCEL = "cancel"


#: (state, event) -> state. What is absent is impossible.
TRANSITIONS: dict[tuple[StepState, StepEvent], StepState] = {
    (StepState.WAITING, StepEvent.INPUTS_READY): StepState.QUEUED,
    (StepState.WAITING, StepEvent.INPUT_FAIL): StepState.CANCELLED,
    (StepState.WAITING, StepEvent.CANCEL): StepState.CANCELLED,
    (StepState.QUEUED, StepEvent.CLAIM): StepState.RUNNING,
    (StepState.QUEUED, StepEvent.CANCEL): StepState.CANCELLED,
    # An expired lease: the claim takes the step over with a higher token.
    (StepState.RUNNING, StepEvent.CLAIM): StepState.RUNNING,
    (StepState.RUNNING, StepEvent.SUCCEED): StepState.SUCCEEDED,
    (StepState.RUNNING, StepEvent.FAIL): StepState.FAILED,
    (StepState.RUNNING, StepEvent.RETRY_LATER): StepState.QUEUED,
    (StepState.RUNNING, StepEvent.RELEASE): StepState.QUEUED,
    (StepState.RUNNING, StepEvent.CANCEL): StepState.CANCELLED,
}

LIVE_STEP_STATES = (StepState.WAITING, StepState.QUEUED, StepState.RUNNING)
FINAL_STEP_STATES = (StepState.SUCCEEDED, StepState.FAILED, StepState.CANCELLED)


def sources_of(event: StepEvent) -> tuple[StepState, ...]:
    """States in which `event` may happen."""
    return tuple(state for (state, known), _ in TRANSITIONS.items() if known is event)


def target_of(event: StepEvent) -> StepState:
    """The one state that `event` leads to."""
    (target,) = {target for (_, known), target in TRANSITIONS.items() if known is event}
    return target


class AttemptState(StrEnum):
    """How one claim of a step ended."""

    #: The holder works, or is dead and its lease has not yet run out.
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    #: A typed error; the step may still be queued again.
    FAILED = "failed"
    CANCELLED = "cancelled"
    #: The lease ran out.
    LOST = "lost"
    #: The worker gave the step back (shutdown); never counted against the step.
    RELEASED = "released"


class VariantState(StrEnum):
    """Where one cell of a job's matrix is; recomputed in the transaction that moves one of its steps."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    #: A gate was missed; the error holds gate, figure and threshold.
    REFUSED = "refused"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL_VARIANT_STATES = (
    VariantState.SUCCEEDED,
    VariantState.REFUSED,
    VariantState.FAILED,
    VariantState.CANCELLED,
)


class JobState(StrEnum):
    """Where a job is; recomputed with its variants."""

    #: No step has run yet.
    QUEUED = "queued"
    RUNNING = "running"
    #: Every variant is published and every benchmark measured.
    SUCCEEDED = "succeeded"
    #: Some variants did not succeed, or a benchmark failed.
    PARTIAL = "partial"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL_JOB_STATES = (JobState.SUCCEEDED, JobState.PARTIAL, JobState.FAILED, JobState.CANCELLED)


class DeviceState(StrEnum):
    """Whether a phone can be measured on; its device worker says so. One that runs a step is `ready` meanwhile."""

    READY = "ready"
    #: adb does not know it any more, or its worker has ended.
    ABSENT = "absent"
    #: adb knows it, and it does not talk.
    OFFLINE = "offline"
    #: It waits for a person to trust the host's key.
    UNAUTHORIZED = "unauthorized"
    #: Nothing brought it back, or it failed again and again: an operator looks at it first.
    QUARANTINED = "quarantined"


class TickOutcome(StrEnum):
    """What became of a schedule's tick."""

    #: Its job was submitted.
    SUBMITTED = "submitted"
    #: The job of an earlier tick had not ended.
    SKIPPED = "skipped"
    #: No worker ran in time, and the schedule leaves out what was missed.
    MISSED = "missed"
    #: The job could not be submitted; the error says why.
    REFUSED = "refused"
