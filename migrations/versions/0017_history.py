"""An index that finds a tenant's benchmarks by age."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

_IS_MEASUREMENT = sa.text("kind = 'benchmark' AND state = 'succeeded'")


def upgrade() -> None:
    op.create_index(
        "ix_steps_measured",
        "steps",
        ["tenant_id", "finalized_at", "id"],
        postgresql_where=_IS_MEASUREMENT,
        sqlite_where=_IS_MEASUREMENT,
    )


def downgrade() -> None:
    op.drop_index("ix_steps_measured", table_name="steps")
