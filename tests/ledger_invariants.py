"""What must hold in a ledger at every moment, told as sentences about what does not.

Reads whole tables through no code of the ledger but its pure judgements, so that a fault in a writer shows here. Called
after every move of the state machine and at the end of a storm (`tests/chaos`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from service.ledger.base import Base
from service.ledger.database import Database
from service.ledger.outcome import StepView, judge_job, judge_variant
from service.ledger.states import (
    FINAL_JOB_STATES,
    FINAL_STEP_STATES,
    FINAL_VARIANT_STATES,
    LIVE_STEP_STATES,
    AttemptState,
    JobState,
    StepState,
    VariantState,
)

Row = dict[str, Any]
_TABLES = (
    "jobs",
    "variants",
    "steps",
    "step_inputs",
    "step_outputs",
    "attempts",
    "job_steps",
    "variant_steps",
    "publications",
    "blobs",
    "events",
)
#: Kinds that leave files.
_MAKERS = frozenset({"fetch", "convert", "quantize", "bundle"})
#: States of steps whose inputs are there.
_BEGUN = frozenset({StepState.QUEUED, StepState.RUNNING, StepState.SUCCEEDED})
#: How the newest attempt at a step may stand, given the step's state; a step that was never claimed has none.
_NEWEST: dict[str, frozenset[str]] = {
    StepState.WAITING: frozenset(),
    StepState.QUEUED: frozenset({AttemptState.FAILED, AttemptState.RELEASED}),
    StepState.RUNNING: frozenset({AttemptState.RUNNING}),
    StepState.SUCCEEDED: frozenset({AttemptState.SUCCEEDED}),
    StepState.FAILED: frozenset({AttemptState.FAILED, AttemptState.LOST}),
    StepState.CANCELLED: frozenset({AttemptState.CANCELLED, AttemptState.FAILED, AttemptState.RELEASED}),
}


@dataclass(frozen=True)
class LedgerRows:
    """Every row that a move can change, by table."""

    tables: dict[str, list[Row]]

    def __getitem__(self, name: str) -> list[Row]:
        return self.tables[name]

    def by_id(self, name: str) -> dict[str, Row]:
        return {row["id"]: row for row in self.tables[name]}

    def grouped(self, name: str, column: str) -> dict[str, list[Row]]:
        groups = defaultdict(list)
        for row in self.tables[name]:
            groups[row[column]].append(row)
        return groups


def read_ledger(database: Database) -> LedgerRows:
    """Read one consistent snapshot of it all, each table in the order of its keys."""

    def read(connection: Any) -> dict[str, list[Row]]:
        tables = (Base.metadata.tables[name] for name in _TABLES)
        return {
            table.name: [dict(row._mapping) for row in connection.execute(select(table).order_by(*table.primary_key))]
            for table in tables
        }

    return LedgerRows(database.read(read))


def find_violations(rows: LedgerRows, stored: Container[str]) -> list[str]:
    """Return what must not be; `stored` holds the digests whose bytes the store has."""
    return [
        *_check_attempts(rows),
        *_check_graph(rows),
        *_check_sharing(rows),
        *_check_jobs(rows),
        *_check_publications(rows),
        *_check_blobs(rows, stored),
        *_check_events(rows),
    ]


def find_stale_writes(rows: LedgerRows) -> list[str]:
    """Return the steps that somebody has ended who did not hold them: their newest attempt knows nothing of it."""
    return list(_check_attempts(rows))


def _check_attempts(rows: LedgerRows) -> Iterator[str]:
    attempts = rows.grouped("attempts", "step_id")
    for step in rows["steps"]:
        own = sorted(attempts[step["id"]], key=lambda attempt: int(attempt["token"]))
        what = f"{step['kind']} {step['id']} ({step['state']}, token {step['token']})"
        if [attempt["token"] for attempt in own] != list(range(1, step["token"] + 1)):
            yield f"{what} has other attempts than its tokens: {[attempt['token'] for attempt in own]}"
        elif own and own[-1]["state"] not in _NEWEST[step["state"]]:
            yield f"{what} has a newest attempt that is {own[-1]['state']}"
        elif not own and step["state"] in (StepState.RUNNING, StepState.SUCCEEDED, StepState.FAILED):
            yield f"{what} was never claimed"
        for attempt in own[:-1]:
            if attempt["state"] in (AttemptState.RUNNING, AttemptState.SUCCEEDED, AttemptState.CANCELLED):
                yield f"{what} has an old attempt {attempt['token']} that is {attempt['state']}"


def _check_graph(rows: LedgerRows) -> Iterator[str]:
    steps = rows.by_id("steps")
    inputs = rows.grouped("step_inputs", "step_id")
    for step in steps.values():
        states = {steps[edge["input_id"]]["state"] for edge in inputs[step["id"]]}
        what = f"{step['kind']} {step['id']} ({step['state']})"
        if step["state"] == StepState.WAITING:
            if states <= {StepState.SUCCEEDED}:
                yield f"{what} is stranded: it waits for nothing"
            elif states & {StepState.FAILED, StepState.CANCELLED}:
                yield f"{what} is stranded: it waits for what will never come"
        elif step["state"] in _BEGUN and not states <= {StepState.SUCCEEDED}:
            yield f"{what} did not wait for its inputs: {sorted(states)}"


def _check_sharing(rows: LedgerRows) -> Iterator[str]:
    jobs = rows.by_id("jobs")
    links = rows.grouped("job_steps", "step_id")
    keys: dict[tuple[str, str], str] = {}
    for step in rows["steps"]:
        is_wanted = any(not link["superseded"] and _is_live(jobs[link["job_id"]]) for link in links[step["id"]])
        if step["state"] in LIVE_STEP_STATES and not is_wanted:
            yield f"{step['kind']} {step['id']} is {step['state']}, and no live job wants it"
        tenants = {jobs[link["job_id"]]["tenant_id"] for link in links[step["id"]]}
        if tenants != {step["tenant_id"]}:
            yield f"{step['kind']} {step['id']} of {step['tenant_id']} is linked by {sorted(tenants)}"
        is_joinable = step["shared"] and step["retired_at"] is None
        if is_joinable and step["state"] not in (StepState.FAILED, StepState.CANCELLED):
            other = keys.setdefault((step["tenant_id"], step["key"]), step["id"])
            if other != step["id"]:
                yield f"{step['kind']} {step['id']} and {other} are the same work"


def _is_live(job: Row) -> bool:
    return job["state"] not in FINAL_JOB_STATES


def _check_jobs(rows: LedgerRows) -> Iterator[str]:
    steps = rows.by_id("steps")
    links = rows.grouped("job_steps", "job_id")
    variants = rows.grouped("variants", "job_id")
    served = rows.grouped("variant_steps", "step_id")
    for job in rows["jobs"]:
        own = [link for link in sorted(links[job["id"]], key=_position) if not link["superseded"]]
        views = [_view(steps[link["step_id"]], link, served, variants[job["id"]]) for link in own]
        if job["state"] == JobState.CANCELLED:
            continue
        states = []
        for variant in sorted(variants[job["id"]], key=_position):
            judged = variant["state"]
            if variant["state"] not in FINAL_VARIANT_STATES:
                judged, _ = judge_variant(variant["id"], views)
            if judged != variant["state"]:
                yield f"variant {variant['name']} of {job['id']} is {variant['state']}, its steps say {judged}"
            states.append(judged)
        verdict = judge_job(states, views)
        if verdict != job["state"]:
            yield f"{job['id']} is {job['state']}, its variants and steps say {verdict}"
        if _is_live(job) and all(view.state in FINAL_STEP_STATES for view in views):
            yield f"{job['id']} is {job['state']} and stranded: nothing of it can run"


def _position(row: Row) -> int:
    return int(row["position"])


def _view(step: Row, link: Row, served: dict[str, list[Row]], variants: list[Row]) -> StepView:
    own = {variant["id"] for variant in variants}
    serves = frozenset(row["variant_id"] for row in served[step["id"]] if row["variant_id"] in own)
    return StepView(step["kind"], step["state"], step["error"], step["token"] > 0 and not link["reused"], serves)


def _check_publications(rows: LedgerRows) -> Iterator[str]:
    steps, jobs = rows.by_id("steps"), rows.by_id("jobs")
    published = defaultdict(list)
    for row in rows["publications"]:
        if row["published_at"] is not None:
            published[row["variant_id"]].append(row["kind"])
            if steps[row["step_id"]]["state"] != StepState.SUCCEEDED:
                yield f"{row['name']} is visible, and its publish step is {steps[row['step_id']]['state']}"
        elif steps[row["step_id"]]["state"] == StepState.SUCCEEDED:
            yield f"{row['name']} is not visible, and its publish step has succeeded"
    for variant in rows["variants"]:
        kinds = sorted(published[variant["id"]])
        if len(set(kinds)) != len(kinds):
            yield f"variant {variant['id']} was published twice: {kinds}"
        request = jobs[variant["job_id"]]["request"]
        asked = sorted(request["formats"])
        if "artifact" in request:
            if kinds:
                yield f"variant {variant['id']} only measures, and published {kinds}"
        elif (kinds == asked) != (variant["state"] == VariantState.SUCCEEDED):
            yield f"variant {variant['id']} is {variant['state']} and published as {kinds}; {asked} was asked for"


def _check_blobs(rows: LedgerRows, stored: Container[str]) -> Iterator[str]:
    jobs, blobs = rows.by_id("jobs"), {row["digest"]: row for row in rows["blobs"]}
    links = rows.grouped("job_steps", "step_id")
    outputs = rows.grouped("step_outputs", "step_id")
    for step in rows["steps"]:
        if step["state"] != StepState.SUCCEEDED:
            if outputs[step["id"]]:
                yield f"{step['kind']} {step['id']} is {step['state']} and has outputs"
            continue
        if step["kind"] in _MAKERS and not outputs[step["id"]]:
            yield f"{step['kind']} {step['id']} has succeeded without outputs"
        is_needed = step["retired_at"] is None or any(_is_live(jobs[link["job_id"]]) for link in links[step["id"]])
        for output in outputs[step["id"]] if is_needed else ():
            if blobs[output["digest"]]["swept_at"] is not None or output["digest"] not in stored:
                yield f"{step['kind']} {step['id']} has succeeded, and its {output['name']} is gone"
    for row in rows["publications"]:
        if row["published_at"] is not None and row["digest"] not in stored:
            yield f"{row['name']} is visible, and its bytes are gone"


def _check_events(rows: LedgerRows) -> Iterator[str]:
    events = rows.grouped("events", "job_id")
    for job in rows["jobs"]:
        numbers = sorted(event["number"] for event in events[job["id"]])
        if numbers != list(range(1, job["event_count"] + 1)):
            yield f"{job['id']} has gaps in its {job['event_count']} events"
