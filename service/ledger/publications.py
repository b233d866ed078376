"""Publications: which artifacts are, or are about to be, visible.

The row that names a manifest's digest is written, fenced, before the manifest is uploaded, and a retry
reuses it: whatever crashes in between, an artifact has one manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, delete, insert, select, update

from service.errors import LeaseLost
from service.ledger.claims import Claim
from service.ledger.clock import now
from service.ledger.database import Transaction, reads, writes
from service.ledger.keys import new_id
from service.ledger.states import AttemptState, StepState
from service.ledger.tables import Attempt, Job, Publication, Step, StepInput, StepOutput, Variant, VariantStep


@dataclass(frozen=True)
class Draft:
    """An artifact that shall become visible."""

    kind: str
    name: str
    digest: str
    size_bytes: int
    manifest_digest: str
    #: Canonical JSON text.
    manifest: str
    signature: str | None = None


@dataclass(frozen=True)
class Ancestor:
    """A step that an artifact descends from."""

    kind: str
    key: str
    params: Mapping[str, Any]
    revision: str
    toolchain_id: str
    figures: Mapping[str, Any]
    #: Output name -> digest.
    outputs: Mapping[str, str]
    #: Input name -> key of the step that made it.
    inputs: Mapping[str, str]
    isolation: str | None


@dataclass(frozen=True)
class Provenance:
    """Where a variant's artifacts come from."""

    request: Mapping[str, Any]
    source: Mapping[str, Any]
    variant: str
    #: Every step upstream of the publication, the earliest first.
    ancestors: tuple[Ancestor, ...]


@reads
def read_provenance(connection: Connection, claim: Claim) -> Provenance:
    """Return what a `publish` step's manifests tell of the way to its artifacts."""
    variant, request, source = connection.execute(
        select(Variant.name, Job.request, Job.source)
        .join(Job, Job.id == Variant.job_id)
        .join(VariantStep, VariantStep.variant_id == Variant.id)
        .where(VariantStep.step_id == claim.step_id)
    ).one()
    found: dict[str, Ancestor] = {}

    def visit(step_id: str) -> str:
        """Add a step after its inputs; return its key."""
        if step_id not in found:
            # A shared step hangs on the fetch of whichever job came first; the checkpoint's digest says it all.
            edges = connection.execute(
                select(StepInput.name, StepInput.input_id)
                .join(Step, Step.id == StepInput.input_id)
                .where(StepInput.step_id == step_id, Step.kind != "fetch")
                .order_by(StepInput.name)
            ).all()
            inputs = {name: visit(input_id) for name, input_id in edges}
            found[step_id] = _read_ancestor(connection, step_id, inputs)
        return found[step_id].key

    for _, supplier in sorted(claim.inputs.items()):
        visit(supplier.step_id)
    return Provenance(request, source or {}, variant, tuple(found.values()))


def _read_ancestor(connection: Connection, step_id: str, inputs: Mapping[str, str]) -> Ancestor:
    step = connection.execute(
        select(Step.kind, Step.key, Step.params, Step.revision, Step.toolchain_id, Step.figures).where(
            Step.id == step_id
        )
    ).one()
    outputs = connection.execute(
        select(StepOutput.name, StepOutput.digest).where(StepOutput.step_id == step_id).order_by(StepOutput.name)
    )
    isolation = connection.execute(
        select(Attempt.isolation).where(Attempt.step_id == step_id, Attempt.state == AttemptState.SUCCEEDED)
    ).scalar()
    return Ancestor(
        step.kind,
        step.key,
        step.params,
        step.revision,
        step.toolchain_id,
        step.figures or {},
        dict(outputs.all()),
        inputs,
        isolation,
    )


@writes
def record_publications(tx: Transaction, claim: Claim, drafts: Sequence[Draft]) -> list[Draft]:
    """Record what a `publish` step is about to publish; return the drafts in force.

    A draft recorded by an earlier attempt of the same step wins over a new one; what another step recorded and never
    published is dropped. Raises `LeaseLost`.
    """
    held = and_(Step.id == claim.step_id, Step.token == claim.token, Step.state == StepState.RUNNING)
    if tx.connection.execute(update(Step).where(held).values(token=Step.token)).rowcount != 1:
        raise LeaseLost(f"The publish step {claim.step_id} is no longer held by this worker.")
    variant_id = tx.connection.execute(
        select(VariantStep.variant_id).where(VariantStep.step_id == claim.step_id)
    ).scalar_one()
    tx.connection.execute(
        delete(Publication).where(
            Publication.variant_id == variant_id,
            Publication.published_at.is_(None),
            Publication.step_id != claim.step_id,
        )
    )
    recorded = {
        row.kind: Draft(
            row.kind, row.name, row.digest, row.size_bytes, row.manifest_digest, row.manifest, row.signature
        )
        for row in tx.connection.execute(select(Publication.__table__).where(Publication.step_id == claim.step_id))
    }
    for draft in drafts:
        if draft.kind in recorded:
            continue
        tx.connection.execute(
            insert(Publication).values(
                id=new_id("art"),
                tenant_id=claim.tenant_id,
                job_id=claim.job_id,
                variant_id=variant_id,
                step_id=claim.step_id,
                created_at=now(),
                **draft.__dict__,
            )
        )
        recorded[draft.kind] = draft
    return [recorded[draft.kind] for draft in drafts]
