"""Peaks of memory that a tenant's measurements have seen, and what phones have to give. Reads only.

Called by `service.api`; what they amount to is `service.fit`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, select

from service.devices import PHONE_CLASS, PHONE_KINDS, list_measured, parse_selector
from service.errors import InvalidRequest, NotFound
from service.fit import PEAKS, Peak, Shape
from service.ledger.database import reads
from service.ledger.devices import describe_offer
from service.ledger.states import StepState
from service.ledger.tables import Device, JobStep, Publication, Step, Variant, VariantStep

#: How many of a tenant's latest benchmarks are looked through.
_MOST_ROWS = 5000


@dataclass(frozen=True)
class Evidence:
    """What an answer is made of."""

    shape: Shape
    #: `id`, `kind`, `name`, `state`, `memory_bytes`, `memory_available_bytes` and when that was seen.
    devices: tuple[dict[str, Any], ...]
    #: The newest first.
    peaks: tuple[Peak, ...]


@reads
def read_evidence(connection: Connection, tenant_id: str, artifact_id: str, selector: str | None) -> Evidence:
    """Return an artifact's shape, the phones that `selector` means (all without), and all that the tenant has measured.

    Raises `NotFound`, and `InvalidRequest` for a selector that is none.
    """
    artifact = connection.execute(_select_shapes(tenant_id).where(Publication.id == artifact_id)).one_or_none()
    if artifact is None:
        raise NotFound(f"There is no artifact {artifact_id!r}.", artifact_id=artifact_id)
    measured = (
        _select_shapes(tenant_id)
        .add_columns(Step.params, Step.figures, Step.finalized_at)
        .join(VariantStep, VariantStep.variant_id == Publication.variant_id)
        .join(Step, Step.id == VariantStep.step_id)
        .where(Step.kind == "benchmark", Step.resource_class == PHONE_CLASS, Step.state == StepState.SUCCEEDED)
        .order_by(Step.finalized_at.desc(), Step.id.desc())
        .limit(_MOST_ROWS)
    )
    peaks: list[Peak] = []
    available: dict[str, tuple[int, str]] = {}
    rows = connection.execute(measured.execution_options(yield_per=50))
    for row, figures in ((one, figures) for one in rows for figures in list_measured(one.figures)):
        device = figures["device"]
        if row.params["format"] != row.kind:
            continue
        seen = {name: figures[name] for name in PEAKS if figures.get(name)}
        backend = figures.get("ran_on") or figures["backend"]
        peaks.append(Peak(_shape_of(row), device["serial"], device["kind"], backend, seen))
        conditions = (figures.get("conditions") or {}).get("before") or {}
        if conditions.get("memory_available_bytes"):
            seen_last = conditions["memory_available_bytes"], row.finalized_at.isoformat()
            available.setdefault(device["serial"], seen_last)
    return Evidence(_shape_of(artifact), tuple(_read_devices(connection, selector, available)), tuple(peaks))


def _select_shapes(tenant_id: str) -> Select[Any]:
    """Select the tenant's published artifacts, each with what its plan has found."""
    plan = (
        select(JobStep.job_id, Step.figures)
        .join(Step, Step.id == JobStep.step_id)
        .where(Step.kind == "plan", Step.state == StepState.SUCCEEDED, JobStep.superseded.is_(False))
        .subquery()
    )
    return (
        select(
            Publication.digest,
            Publication.kind,
            Publication.size_bytes,
            Variant.engine,
            plan.c.figures.label("facts"),
        )
        .join(Variant, Variant.id == Publication.variant_id)
        .join(plan, plan.c.job_id == Publication.job_id)
        .where(Publication.tenant_id == tenant_id, Publication.published_at.is_not(None))
    )


def _shape_of(row: Any) -> Shape:
    # Plans of older versions did not say how many layers there are.
    cache_units = row.facts["context_length"] * row.facts.get("layers", 1)
    return Shape(row.digest, row.kind, row.engine, row.size_bytes, cache_units)


def _read_devices(
    connection: Connection, selector: str | None, available: dict[str, tuple[int, str]]
) -> list[dict[str, Any]]:
    try:
        wanted = parse_selector(selector or "any")
    except ValueError as error:
        raise InvalidRequest(f"device: {error}.", device=selector) from None
    rows = connection.execute(select(Device.__table__).order_by(Device.id))
    found = []
    for row in rows:
        if row.record.get("kind") in PHONE_KINDS and wanted.fits(describe_offer(row)):
            available_bytes, seen_at = available.get(row.id, (None, None))
            found.append(
                {
                    "id": row.id,
                    "kind": row.record["kind"],
                    "name": row.record.get("model") or row.id,
                    "state": row.state,
                    "memory_bytes": row.record.get("memory_bytes"),
                    "memory_available_bytes": available_bytes,
                    "memory_available_at": seen_at,
                }
            )
    return found
