"""What running attempts have printed last."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempts", sa.Column("live_log", sa.Text(), nullable=True))
    op.add_column("attempts", sa.Column("live_log_bytes", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("attempts", "live_log_bytes")
    op.drop_column("attempts", "live_log")
