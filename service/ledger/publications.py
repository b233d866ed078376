"""Publications: which artifacts are, or are about to be, visible.

The row that names a manifest's digest is written, fenced, before the manifest is uploaded, and a retry
reuses it: whatever crashes in between, an artifact has one manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import and_, insert, select, update

from service.errors import LeaseLost
from service.ledger.clock import now
from service.ledger.database import Transaction, writes
from service.ledger.keys import new_id
from service.ledger.states import StepState
from service.ledger.tables import Publication, Step, VariantStep
from service.ledger.work import Claim


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


@writes
def record_publications(tx: Transaction, claim: Claim, drafts: Sequence[Draft]) -> list[Draft]:
    """Record what a `publish` step is about to publish; return the drafts in force.

    A draft recorded by an earlier attempt wins over a new one. Raises `LeaseLost`.
    """
    held = and_(Step.id == claim.step_id, Step.token == claim.token, Step.state == StepState.RUNNING)
    if tx.connection.execute(update(Step).where(held).values(token=Step.token)).rowcount != 1:
        raise LeaseLost(f"The publish step {claim.step_id} is no longer held by this worker.")
    variant_id = tx.connection.execute(
        select(VariantStep.variant_id).where(VariantStep.step_id == claim.step_id)
    ).scalar_one()
    recorded = {
        row.kind: Draft(row.kind, row.name, row.digest, row.size_bytes, row.manifest_digest, row.manifest)
        for row in tx.connection.execute(select(Publication.__table__).where(Publication.variant_id == variant_id))
    }
    for draft in drafts:
        if draft.kind in recorded:
            tx.connection.execute(
                update(Publication)
                .where(Publication.variant_id == variant_id, Publication.kind == draft.kind)
                .values(step_id=claim.step_id)
            )
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
