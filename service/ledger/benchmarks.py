"""Benchmarks of what was published before: a job of its own, which has no other steps.

It links the steps that made and proved the artifact, so that their bytes stay as long as it lives, and its benchmarks
serve the artifact's variant too: that is how they are found beside it. The job that made the artifact is not touched.
Called by `service.api`, and by `service.ledger.replan` for a retry; docs/decisions/0029-later-benchmarks.md says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert, select

from service.errors import Conflict, NotFound
from service.ledger import locks
from service.ledger.database import Transaction, writes
from service.ledger.devices import name_devices
from service.ledger.events import emit
from service.ledger.graph import NO_TOOLCHAIN, add_steps, link_steps, serve_variants
from service.ledger.idempotency import Submission, claim_idempotency_key
from service.ledger.keys import digest_json, new_id
from service.ledger.moves import recompute_job
from service.ledger.plan import expand_measuring
from service.ledger.quotas import require_room_for_job
from service.ledger.states import JobState, VariantState
from service.ledger.tables import Blob, Job, Publication, Step, StepInput, StepOutput, Variant
from service.requests import BenchmarkRequest, MeasuringRequest, parse_measuring_request, parse_stored_request


@dataclass(frozen=True)
class _Artifact:
    """A published artifact, whose steps are locked: the job that made it is not removed meanwhile."""

    #: Columns of the publication, its variant and its job.
    row: Any
    #: Input of a benchmark -> the step that made it.
    steps: Mapping[str, str]


@writes
def submit_benchmark(
    tx: Transaction,
    tenant_id: str,
    artifact_id: str,
    asked: BenchmarkRequest,
    *,
    processes: int,
    idempotency_key: str | None = None,
    traceparent: str | None = None,
) -> Submission:
    """Enter a job that measures an artifact; `processes` is the operator's protocol.

    Raises `NotFound`, `InvalidRequest` for a profile of a bundle, `QuotaExceeded`, and `IdempotencyMismatch` when the
    key was used for something else.
    """
    job_id = new_id("job")
    if idempotency_key is not None:
        digest = digest_json({"artifact": artifact_id, **asked.model_dump(mode="json", exclude_defaults=True)})
        earlier = claim_idempotency_key(tx, tenant_id, idempotency_key, digest, job_id)
        if earlier is not None:
            return Submission(earlier, is_new=False)
    artifact = _lock_artifact(tx, tenant_id, artifact_id)
    if artifact is None:
        raise NotFound(f"There is no artifact {artifact_id!r}.", artifact_id=artifact_id)
    at = require_room_for_job(tx, tenant_id)
    request = _narrow_request(artifact, asked, processes)
    owner = {"tenant_id": tenant_id, "created_at": at}
    tx.connection.execute(
        insert(Job).values(
            id=job_id,
            request=request.to_json(),
            state=JobState.QUEUED,
            priority=request.priority,
            source=artifact.row.source,
            traceparent=traceparent,
            event_count=0,
            **owner,
        )
    )
    variant = {"name": artifact.row.variant, "engine": artifact.row.engine, "recipe": artifact.row.recipe}
    tx.connection.execute(
        insert(Variant).values(
            id=new_id("var"), job_id=job_id, position=0, state=VariantState.PENDING, **variant, **owner
        )
    )
    emit(tx, [job_id], "job", {"state": JobState.QUEUED})
    artifact = _without_what_is_gone(tx, artifact)
    link_steps(tx, job_id, dict.fromkeys(artifact.steps.values()), artifact.row.variant)
    _add_steps(tx, job_id, request, artifact)
    return Submission(job_id, is_new=True)


def add_benchmarks(tx: Transaction, job_id: str, request: MeasuringRequest) -> None:
    """Add the benchmarks of a job that is tried again; those that were made are found again. Raises `Conflict`."""
    tenant_id = tx.connection.execute(select(Job.tenant_id).where(Job.id == job_id)).scalar_one()
    artifact = _lock_artifact(tx, tenant_id, request.artifact)
    if artifact is None:
        raise Conflict(
            f"Job {job_id} measures the artifact {request.artifact}, which is gone.", artifact_id=request.artifact
        )
    _add_steps(tx, job_id, request, _without_what_is_gone(tx, artifact))


def _lock_artifact(tx: Transaction, tenant_id: str, artifact_id: str) -> _Artifact | None:
    statement = (
        select(
            Publication.id,
            Publication.variant_id,
            Publication.step_id,
            Publication.kind,
            Variant.name.label("variant"),
            Variant.engine,
            Variant.recipe,
            Job.request,
            Job.source,
        )
        .join(Variant, Variant.id == Publication.variant_id)
        .join(Job, Job.id == Publication.job_id)
        .where(Publication.id == artifact_id, Publication.tenant_id == tenant_id, Publication.published_at.is_not(None))
    )
    row = tx.connection.execute(statement).one_or_none()
    if row is None:
        return None
    inputs = select(StepInput.name, StepInput.input_id).where(StepInput.step_id == row.step_id)
    published = dict(tx.connection.execute(inputs).all())
    inputs_of = {
        "artifact": f"artifact_{row.kind}",
        "verify": f"verify_{row.kind}",
        "reference": "reference",
        "graph": "verify_tflite",
    }
    steps = {name: published[published_as] for name, published_as in inputs_of.items()}
    # Whoever removes the job locks its steps first: after this it is gone, or stays until we are done.
    locks.lock_steps(tx, steps.values())
    row = tx.connection.execute(statement).one_or_none()
    return None if row is None else _Artifact(row, steps)


def _without_what_is_gone(tx: Transaction, artifact: _Artifact) -> _Artifact:
    """Leave out the host's answers where their files were swept; a link to their steps keeps them from now on."""
    answers = {name: artifact.steps[name] for name in ("reference", "graph")}
    is_theirs = StepOutput.step_id.in_(answers.values())
    digests = list(tx.connection.execute(select(StepOutput.digest).where(is_theirs)).scalars())
    locks.lock_blobs(tx, digests)
    gone = select(Blob.digest).where(Blob.digest.in_(digests), Blob.swept_at.is_not(None)).limit(1)
    if tx.connection.execute(gone).first() is None:
        return artifact
    return _Artifact(artifact.row, {name: step for name, step in artifact.steps.items() if name not in answers})


def _narrow_request(artifact: _Artifact, asked: BenchmarkRequest, processes: int) -> MeasuringRequest:
    """Return what the new job holds: the request that made the artifact without what was for others, and `asked`."""
    made = parse_stored_request(artifact.row.request)
    engine, recipe = made.variant_names[artifact.row.variant]
    own_recipes = {name: entries for name, entries in made.own_recipes.items() if name == recipe}
    kept = ("source", "prefill_lengths", "context_length", "ignore_custom_code")
    document = made.to_json()
    narrowed = {name: document[name] for name in kept}
    narrowed |= {"engines": [engine], "recipes": [recipe], "formats": [artifact.row.kind], "own_recipes": own_recipes}
    measuring = {"artifact": artifact.row.id, "processes": processes}
    return parse_measuring_request({**narrowed, **measuring, **asked.model_dump(mode="json")})


def _add_steps(tx: Transaction, job_id: str, request: MeasuringRequest, artifact: _Artifact) -> None:
    proof = tx.connection.execute(select(Step.params).where(Step.id == artifact.steps["verify"])).scalar_one()
    known = dict(artifact.steps)
    devices = name_devices(tx.connection, request.devices)
    specs = expand_measuring(request, artifact.row.variant, artifact.steps, proof, devices)
    # Any worker may measure it, whatever versions its tools have: the measurement says which.
    add_steps(tx, job_id, specs, NO_TOOLCHAIN, known, None)
    for spec in specs:
        serve_variants(tx, known[spec.name], [artifact.row.variant_id])
    recompute_job(tx, job_id)
