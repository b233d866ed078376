"""Measurements of a published artifact: documents of their own beside it, never edits of its manifest. Reads only.

Called by `service.api.artifacts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, select

from service.devices import list_measured
from service.errors import NotFound
from service.ledger.database import reads
from service.ledger.states import StepState
from service.ledger.tables import Publication, Step, StepOutput, VariantStep

#: As a benchmark's step calls it, where its figures name no other.
_DOCUMENT = "measurement.json"


@reads
def list_measurements(connection: Connection, tenant_id: str, artifact_id: str) -> list[dict[str, Any]]:
    """Return what was measured of an artifact, oldest first, each with where its whole document is; `NotFound`."""
    artifact = connection.execute(
        select(Publication.__table__).where(
            Publication.id == artifact_id, Publication.tenant_id == tenant_id, Publication.published_at.is_not(None)
        )
    ).one_or_none()
    if artifact is None:
        raise NotFound(f"There is no artifact {artifact_id!r}.", artifact_id=artifact_id)
    rows = connection.execute(
        select(
            Step.params,
            Step.figures,
            Step.finalized_at,
            StepOutput.name.label("document"),
            StepOutput.digest,
            StepOutput.size_bytes,
        )
        .join(VariantStep, VariantStep.step_id == Step.id)
        .join(StepOutput, StepOutput.step_id == Step.id)
        .where(
            VariantStep.variant_id == artifact.variant_id,
            Step.kind == "benchmark",
            Step.state == StepState.SUCCEEDED,
        )
        .order_by(Step.finalized_at, Step.id, StepOutput.name)
    )
    return [
        {
            "name": _name(artifact.name, measured, row.digest),
            "sha256": row.digest,
            "size_bytes": row.size_bytes,
            "url": f"/v1/artifacts/{artifact_id}/measurements/{row.digest}",
            "measured_at": row.finalized_at.isoformat(),
            **measured,
        }
        for row in rows
        if row.params["format"] == artifact.kind
        for measured in list_measured(row.figures)
        if measured.get("document", _DOCUMENT) == row.document
    ]


def _name(artifact: str, figures: Mapping[str, Any], digest: str) -> str:
    """A file name that tells a measurement from the others of its artifact."""
    device = figures["device"]
    place = "".join(letter if letter.isalnum() else "-" for letter in str(device.get("serial") or device["kind"]))
    return f"{artifact}.{place}.{digest[:8]}.measurement.json"
