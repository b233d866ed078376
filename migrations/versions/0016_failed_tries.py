"""How often a resumable upload could not be put together."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("resumable_uploads", sa.Column("failed_tries", sa.BigInteger(), server_default="0", nullable=False))


def downgrade() -> None:
    op.drop_column("resumable_uploads", "failed_tries")
