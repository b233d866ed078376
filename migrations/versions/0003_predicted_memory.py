"""What steps are predicted to need of memory, and what workers may use."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("steps", sa.Column("predicted_peak_anon_bytes", sa.BigInteger(), nullable=True))
    op.add_column("workers", sa.Column("memory_limit_bytes", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("workers", "memory_limit_bytes")
    op.drop_column("steps", "predicted_peak_anon_bytes")
