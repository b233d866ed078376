"""Workers tell their disk, can be drained and say that they end; keys of operators."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from service.ledger.clock import Instant

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("disk_bytes", "disk_free_bytes"):
        op.add_column("workers", sa.Column(name, sa.BigInteger(), nullable=True))
    for name in ("draining_at", "ended_at"):
        op.add_column("workers", sa.Column(name, Instant(), nullable=True))
    op.add_column("api_keys", sa.Column("is_operator", sa.Boolean(), server_default=sa.false(), nullable=False))


def downgrade() -> None:
    op.drop_column("api_keys", "is_operator")
    for name in ("ended_at", "draining_at", "disk_free_bytes", "disk_bytes"):
        op.drop_column("workers", name)
