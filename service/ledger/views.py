"""What readers see of the ledger: JSON documents, one consistent snapshot each. Writes nothing.

Called by `service.api` and by `edgekiln logs` through it. Every function takes the tenant and finds nothing
of another.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Connection, func, literal, select, tuple_

from service.devices import list_measured
from service.errors import InvalidRequest, NotFound
from service.ledger.base import Base
from service.ledger.clock import Instant
from service.ledger.database import reads
from service.ledger.states import FINAL_JOB_STATES, JobState
from service.ledger.tables import Attempt, Blob, Event, Job, JobStep, Publication, Step, Variant, VariantStep


def _iso(instant: dt.datetime | None) -> str | None:
    return None if instant is None else instant.isoformat()


@reads
def read_job(connection: Connection, tenant_id: str, job_id: str) -> dict[str, Any]:
    """Return a job whole: request, variants with artifacts and figures, steps with attempts. Raises `NotFound`."""
    job = find_job(connection, tenant_id, job_id)
    steps = _read_steps(connection, job_id)
    return _describe_job(job, _read_variants(connection, job_id, steps), steps)


def describe_new_job(
    job: Mapping[str, Any], variants: Sequence[Mapping[str, Any]], step: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a job whole that was just entered as these rows, as `read_job` would."""
    first = _step_document(_as_row(Step, step, reused=False), [], [])
    documents = [_describe_variant(_as_row(Variant, variant), [], [first]) for variant in variants]
    return _describe_job(_as_row(Job, job), documents, [first])


def _as_row(table: type[Base], values: Mapping[str, Any], **more: Any) -> Any:
    """Return the row that the database would: what was not given is null."""
    return SimpleNamespace(**(dict.fromkeys(table.__table__.c.keys()) | dict(values) | more))


def _describe_job(
    job: Any, variants: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    return {
        **summarize_job(job),
        "request": job.request,
        "source": job.source,
        "variants": list(variants),
        "steps": [_public_step(step, {variant["id"]: variant["name"] for variant in variants}) for step in steps],
    }


#: Fields of a step that its readers find elsewhere in the document.
_INTERNAL = ("figures", "params", "variant_ids")


def _public_step(step: Mapping[str, Any], variant_names: Mapping[str, str]) -> dict[str, Any]:
    """Return a step as its readers see it: with what tells it from others of its kind."""
    return {
        **{name: value for name, value in step.items() if name not in _INTERNAL},
        "variants": [variant_names[variant_id] for variant_id in step["variant_ids"]],
        "format": step["params"].get("format"),
    }


def find_job(connection: Connection, tenant_id: str, job_id: str) -> Any:
    """Return a job's row; raises `NotFound`."""
    row = connection.execute(select(Job.__table__).where(Job.id == job_id, Job.tenant_id == tenant_id)).one_or_none()
    if row is None:
        raise NotFound(f"There is no job {job_id!r}. `edgekiln jobs` lists those there are.", job_id=job_id)
    return row


def summarize_job(job: Any) -> dict[str, Any]:
    """Return what every document about a job begins with, from its row."""
    return {
        "id": job.id,
        "state": job.state,
        "is_final": job.state in FINAL_JOB_STATES,
        "priority": job.priority,
        "created_at": _iso(job.created_at),
        "finalized_at": _iso(job.finalized_at),
        "event_count": job.event_count,
    }


def _read_steps(connection: Connection, job_id: str) -> list[dict[str, Any]]:
    attempts = defaultdict(list)
    for row in connection.execute(
        select(Attempt.__table__)
        .join(JobStep, JobStep.step_id == Attempt.step_id)
        .where(JobStep.job_id == job_id)
        .order_by(Attempt.token)
    ):
        attempts[row.step_id].append(row)
    serves = defaultdict(list)
    for row in connection.execute(
        select(VariantStep.step_id, VariantStep.variant_id)
        .join(Variant, Variant.id == VariantStep.variant_id)
        .where(Variant.job_id == job_id)
        .order_by(Variant.position)
    ):
        serves[row.step_id].append(row.variant_id)
    rows = connection.execute(
        select(Step.__table__, JobStep.reused)
        .join(JobStep, JobStep.step_id == Step.id)
        .where(JobStep.job_id == job_id, JobStep.superseded.is_(False))
        .order_by(JobStep.position)
    )
    return [_step_document(row, attempts[row.id], serves[row.id]) for row in rows]


def _step_document(row: Any, attempts: Sequence[Any], variant_ids: list[str]) -> dict[str, Any]:
    last = attempts[-1] if attempts else None
    return {
        "id": row.id,
        "kind": row.kind,
        "key": row.key,
        "state": row.state,
        "reused": row.reused,
        "attempts": len(attempts),
        "duration_s": last.duration_s if last else None,
        "peak_rss_bytes": last.peak_rss_bytes if last else None,
        "peak_anon_bytes": last.peak_anon_bytes if last else None,
        "predicted_peak_anon_bytes": row.predicted_peak_anon_bytes,
        "isolation": last.isolation if last else None,
        "progress": row.progress,
        "error": row.error,
        "created_at": _iso(row.created_at),
        "started_at": _iso(last.started_at) if last else None,
        "finalized_at": _iso(row.finalized_at),
        "figures": row.figures,
        "params": row.params,
        "variant_ids": variant_ids,
    }


def _read_variants(connection: Connection, job_id: str, steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    artifacts = defaultdict(list)
    for row in connection.execute(
        select(Publication.__table__)
        .where(Publication.job_id == job_id, Publication.published_at.is_not(None))
        .order_by(Publication.kind)
    ):
        artifacts[row.variant_id].append(describe_artifact(row))
    return [
        _describe_variant(row, artifacts[row.id], steps)
        for row in connection.execute(
            select(Variant.__table__).where(Variant.job_id == job_id).order_by(Variant.position)
        )
    ]


def _describe_variant(row: Any, artifacts: list[dict[str, Any]], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "engine": row.engine,
        "recipe": row.recipe,
        "state": row.state,
        "error": row.error,
        "artifacts": artifacts,
        **_proof(row.id, steps),
        "measurements": [
            {"format": step["params"]["format"], **measured}
            for step in steps
            if step["kind"] == "benchmark" and step["figures"] and row.id in step["variant_ids"]
            for measured in list_measured(step["figures"])
        ],
    }


def _proof(variant_id: str, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The graph's parity, and the quality of the graph and of each bundle; None until they were measured."""
    by_format = {
        step["params"]["format"]: step["figures"]
        for step in steps
        if step["kind"] == "verify" and step["figures"] and variant_id in step["variant_ids"]
    }
    graph = by_format.get("tflite", {})
    quality = graph.get("quality")
    return {
        "parity": graph.get("parity"),
        "quality": quality
        and {**quality, "by_format": {kind: figures.get("quality") for kind, figures in by_format.items()}},
    }


def describe_artifact(row: Any) -> dict[str, Any]:
    """Return a publication's row as its readers see it."""
    return {
        "id": row.id,
        "name": row.name,
        "kind": row.kind,
        "sha256": row.digest,
        "size_bytes": row.size_bytes,
        "url": f"/v1/artifacts/{row.id}",
        "manifest_sha256": row.manifest_digest,
        "manifest_url": f"/v1/artifacts/{row.id}/manifest",
        "signature_url": f"/v1/artifacts/{row.id}/signature" if row.signature else None,
        "measurements_url": f"/v1/artifacts/{row.id}/measurements",
        "published_at": _iso(row.published_at),
    }


@reads
def list_jobs(
    connection: Connection, tenant_id: str, *, states: Sequence[str] = (), limit: int = 50, before: str | None = None
) -> list[dict[str, Any]]:
    """Return jobs, newest first; `before` is the id of the last job of the page before."""
    for state in states:
        if state not in list(JobState):
            raise InvalidRequest(f"There is no job state {state!r}. Known: {', '.join(JobState)}.", state=state)
    statement = select(Job.__table__).where(Job.tenant_id == tenant_id)
    if before is not None:
        last = find_job(connection, tenant_id, before)
        # Compared as a pair, which an index has in order; an OR of two comparisons it has not.
        newest = tuple_(literal(last.created_at, Instant()), literal(last.id))
        statement = statement.where(tuple_(Job.created_at, Job.id) < newest)
    page = statement.order_by(Job.created_at.desc(), Job.id.desc()).limit(limit)
    if states:
        # Each state has its own place in the index: a page of each holds a page of all.
        found = [row for state in set(states) for row in connection.execute(page.where(Job.state == state))]
        rows = sorted(found, key=lambda row: (row.created_at, row.id), reverse=True)[:limit]
    else:
        rows = list(connection.execute(page))
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    for job_id, state, count in connection.execute(
        select(Variant.job_id, Variant.state, func.count())
        .where(Variant.job_id.in_([row.id for row in rows]))
        .group_by(Variant.job_id, Variant.state)
    ):
        counts[job_id][state] = count
    return [{**summarize_job(row), "request": row.request, "variant_states": counts[row.id]} for row in rows]


@reads
def read_events(connection: Connection, tenant_id: str, job_id: str, after: int, limit: int = 500) -> dict[str, Any]:
    """Return a job's events with numbers above `after`, and whether the job has ended."""
    job = find_job(connection, tenant_id, job_id)
    rows = connection.execute(
        select(Event.__table__).where(Event.job_id == job_id, Event.number > after).order_by(Event.number).limit(limit)
    )
    events = [
        {"number": row.number, "kind": row.kind, "data": row.data, "created_at": _iso(row.created_at)} for row in rows
    ]
    last = events[-1]["number"] if events else after
    return {"events": events, "is_final": job.state in FINAL_JOB_STATES and last >= job.event_count}


@reads
def list_logs(connection: Connection, tenant_id: str, job_id: str, kind: str | None = None) -> list[dict[str, Any]]:
    """Return where the logs of a job's attempts are: blob digests, and the ends of those that run."""
    find_job(connection, tenant_id, job_id)
    statement = (
        select(
            Step.id,
            Step.kind,
            Attempt.token,
            Attempt.state,
            Attempt.error,
            Attempt.log_digest,
            Blob.size_bytes.label("log_bytes"),
            Attempt.live_log,
            Attempt.live_log_bytes,
            Attempt.started_at,
            Attempt.finished_at,
        )
        .join(Attempt, Attempt.step_id == Step.id)
        .join(JobStep, JobStep.step_id == Step.id)
        .outerjoin(Blob, Blob.digest == Attempt.log_digest)
        .where(JobStep.job_id == job_id)
        .order_by(JobStep.position, Attempt.token)
    )
    if kind is not None:
        statement = statement.where(Step.kind == kind)
    return [
        {
            "step_id": row.id,
            "kind": row.kind,
            "attempt": row.token,
            "state": row.state,
            "error": row.error,
            "log_digest": row.log_digest,
            "log_bytes": row.log_bytes,
            "live_log": row.live_log,
            "live_log_bytes": row.live_log_bytes,
            "started_at": _iso(row.started_at),
            "finished_at": _iso(row.finished_at),
        }
        for row in connection.execute(statement)
    ]


@reads
def read_artifact(connection: Connection, tenant_id: str, artifact_id: str) -> dict[str, Any]:
    """Return a published artifact with its manifest and signature; raises `NotFound`."""
    row = connection.execute(
        select(Publication.__table__).where(
            Publication.id == artifact_id,
            Publication.tenant_id == tenant_id,
            Publication.published_at.is_not(None),
        )
    ).one_or_none()
    if row is None:
        raise NotFound(f"There is no artifact {artifact_id!r}.", artifact_id=artifact_id)
    return {**describe_artifact(row), "manifest": row.manifest, "signature": row.signature}


@reads
def list_artifacts(connection: Connection, tenant_id: str, job_id: str) -> list[dict[str, Any]]:
    """Return a job's published artifacts with their variants' names."""
    find_job(connection, tenant_id, job_id)
    rows = connection.execute(
        select(Publication.__table__, Variant.name.label("variant"))
        .join(Variant, Variant.id == Publication.variant_id)
        .where(Publication.job_id == job_id, Publication.published_at.is_not(None))
        .order_by(Variant.position, Publication.kind)
    )
    return [{**describe_artifact(row), "variant": row.variant} for row in rows]
