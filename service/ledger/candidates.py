"""What a job's artifacts can be chosen by: one candidate a variant and format, in the order of the request.

Reads only; one consistent snapshot. Called by `service.api.choice`, and by `service.commands.choice` where no server
runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, select

from service import gates
from service.comparison import Candidate
from service.devices import keep_one_kind, list_measured
from service.ledger import views
from service.ledger.database import reads
from service.ledger.tables import JobStep, Publication, Step, Variant, VariantStep

#: A measurement's verdict, the worst last.
_VERDICTS = ("stable", "noisy", "hot", "short", "dead")


@reads
def read_candidates(connection: Connection, tenant_id: str, job_id: str) -> tuple[dict[str, Any], list[Candidate]]:
    """Return a job's summary (`id`, `state`, `is_final`, ...) and its candidates. Raises `NotFound`."""
    job = views.find_job(connection, tenant_id, job_id)
    figures = _read_figures(connection, job_id)
    artifacts = {
        (row.variant_id, row.kind): views.describe_artifact(row)
        for row in connection.execute(
            select(Publication.__table__).where(Publication.job_id == job_id, Publication.published_at.is_not(None))
        )
    }
    variants = connection.execute(select(Variant.__table__).where(Variant.job_id == job_id).order_by(Variant.position))
    return views.summarize_job(job), [
        _make_candidate(variant, kind, figures[variant.id], artifacts.get((variant.id, kind)))
        for variant in variants
        for kind in job.request["formats"]
    ]


#: Step kind -> figures of the steps of that kind, with the format that each is about.
_Figures = Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]]


def _read_figures(connection: Connection, job_id: str) -> Mapping[str, _Figures]:
    """Return variant id -> figures of its verifications and benchmarks."""
    found: dict[str, dict[str, list[tuple[str, Mapping[str, Any]]]]] = defaultdict(lambda: defaultdict(list))
    rows = connection.execute(
        select(VariantStep.variant_id, Step.kind, Step.params, Step.figures)
        .join(Step, Step.id == VariantStep.step_id)
        .join(Variant, Variant.id == VariantStep.variant_id)
        .join(JobStep, JobStep.step_id == Step.id)
        .where(
            Variant.job_id == job_id,
            JobStep.job_id == job_id,
            JobStep.superseded.is_(False),
            Step.kind.in_(("verify", "benchmark")),
            Step.figures.is_not(None),
        )
        .order_by(JobStep.position)
    )
    for row in rows:
        found[row.variant_id][row.kind].append((row.params["format"], row.figures))
    return found


def _make_candidate(variant: Any, kind: str, figures: _Figures, artifact: Mapping[str, Any] | None) -> Candidate:
    # A bundle's proof leans on that of the graph in it.
    verified = {of: found for of, found in figures.get("verify", ()) if of in ("tflite", kind)}
    merged = gates.merge_figures(verified.values())
    merged["size_bytes"] = verified.get(kind, {}).get("size_bytes")
    measured = keep_one_kind(
        [each for of, found in figures.get("benchmark", ()) if of == kind for each in list_measured(found)]
    )
    if measured:
        merged["benchmark"] = gates.merge_benchmarks(measured)
    return Candidate(
        variant=variant.name,
        engine=variant.engine,
        recipe=variant.recipe,
        format=kind,
        state=variant.state,
        error=variant.error,
        artifact=artifact,
        figures=merged,
        measurement=max(
            (found["verdict"] for found in measured if "verdict" in found), key=_VERDICTS.index, default=None
        ),
    )
