"""Tokens of tenants for their sources, sealed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from service.ledger.clock import Instant

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "source_tokens",
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("sealed", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.String(32), nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_source_tokens_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("tenant_id", "kind", name=op.f("pk_source_tokens")),
    )


def downgrade() -> None:
    op.drop_table("source_tokens")
