"""Plans of jobs made anew: after a retry, and where nobody has the tools any more that a step was planned for.

Called inside the transactions of `service.ledger.jobs` and `service.ledger.claims`; the jobs are locked.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select, update

from service.devices import list_arms
from service.ledger.benchmarks import add_benchmarks
from service.ledger.clock import now
from service.ledger.database import Transaction
from service.ledger.graph import NO_TOOLCHAIN, add_steps
from service.ledger.locks import HeldStep
from service.ledger.moves import drop_unwanted_steps, recompute_job
from service.ledger.plan import expand_submitted, plan_spec
from service.ledger.states import StepState
from service.ledger.tables import Job, JobStep, Step
from service.requests import JobRequest, MeasuringRequest, parse_stored_request

#: How often a job is planned anew for other tools, its retries counted in; then its step ends with `toolchain_changed`.
_MOST_PLANS = 8
#: Pause before a job's second new plan; doubles each time, up to the longest. The upgrade that it waits for goes on.
_FIRST_PAUSE_S = 30.0
_LONGEST_PAUSE_S = 600.0


def plan_anew(tx: Transaction, held: HeldStep) -> bool:
    """Let every job that wants a step plan anew, by the tools that workers have now; return whether they do.

    Finished steps are kept, and joined again where the new plan has the same. Nothing is done when one of the jobs was
    planned too often already.
    """
    plans = {job_id: _count_plans(tx, job_id) for job_id in held.live_job_ids}
    if not plans or max(plans.values()) > _MOST_PLANS:
        return False
    for job_id, count in plans.items():
        request = parse_stored_request(tx.connection.execute(select(Job.request).where(Job.id == job_id)).scalar_one())
        supersede_unfinished(tx, job_id)
        drop_unwanted_steps(tx, job_id)
        pause_s = 0.0 if count <= 1 else min(_FIRST_PAUSE_S * 2 ** (count - 2), _LONGEST_PAUSE_S)
        begin_again(tx, job_id, request, keeps_checkpoint=True, pause_s=pause_s)
        recompute_job(tx, job_id)
    return True


def _count_plans(tx: Transaction, job_id: str) -> int:
    statement = (
        select(func.count())
        .select_from(JobStep)
        .join(Step, Step.id == JobStep.step_id)
        .where(JobStep.job_id == job_id, Step.kind == "plan")
    )
    return int(tx.connection.execute(statement).scalar_one())


def begin_again(
    tx: Transaction, job_id: str, request: JobRequest, *, keeps_checkpoint: bool, pause_s: float = 0.0
) -> None:
    """Add the step that a job begins again with: its plan if the checkpoint is kept and there, else the whole job's.

    One that measures an artifact begins with its benchmarks; raises `Conflict` when the artifact is gone.
    """
    if isinstance(request, MeasuringRequest):
        add_benchmarks(tx, job_id, request)
        return
    fetch = _usable_fetch(tx, job_id) if keeps_checkpoint else None
    if fetch is not None:
        known = {"fetch": fetch.id}
        add_steps(tx, job_id, [plan_spec(request)], NO_TOOLCHAIN, known, fetch.figures["checkpoint_digest"])
    else:
        known = {}
        add_steps(tx, job_id, expand_submitted(request), NO_TOOLCHAIN, known, None)
    if pause_s:
        first = known["plan" if fetch is not None else "resolve"]
        tx.connection.execute(update(Step).where(Step.id == first).values(run_after=now(pause_s)))


def supersede_unfinished(tx: Transaction, job_id: str, *, measures_again: bool = False) -> dict[str, str]:
    """Set aside the steps that a new plan replaces; return the last state of each kind.

    Those are all that did not succeed, benchmarks that measured only some of their arms, and the succeeded preludes:
    what follows pins and plans anew. With `measures_again`, benchmarks are made again that are not stable, too.
    """
    last_state: dict[str, str] = {}
    for row in tx.connection.execute(
        select(Step.id, Step.kind, Step.state, Step.error, Step.params, Step.figures)
        .join(JobStep, JobStep.step_id == Step.id)
        .where(JobStep.job_id == job_id, JobStep.superseded.is_(False))
        .order_by(JobStep.position)
    ).all():
        last_state[row.kind] = row.state
        is_lacking = row.error is not None or row.kind in ("resolve", "plan") or (measures_again and _is_unstable(row))
        if row.state != StepState.SUCCEEDED or is_lacking:
            tx.connection.execute(
                update(JobStep).where(JobStep.job_id == job_id, JobStep.step_id == row.id).values(superseded=True)
            )
    return last_state


def _is_unstable(step: Any) -> bool:
    """Whether a benchmark's figures are worth less than gates demand."""
    if step.kind != "benchmark" or step.figures is None:
        return False
    return any(found.get("verdict") != "stable" for found, _ in list_arms(step.params, step.figures))


def _usable_fetch(tx: Transaction, job_id: str) -> Any | None:
    """Return the job's last `fetch` whose files are still there, with its figures."""
    return tx.connection.execute(
        select(Step.id, Step.figures)
        .join(JobStep, JobStep.step_id == Step.id)
        .where(
            JobStep.job_id == job_id,
            Step.kind == "fetch",
            Step.state == StepState.SUCCEEDED,
            Step.retired_at.is_(None),
        )
        .order_by(JobStep.position.desc())
        .limit(1)
    ).one_or_none()
