"""Quotas of tenants; jobs are found by tenant and state, and unfinished ones alone."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_IS_UNFINISHED = sa.text("finalized_at IS NULL")
_QUOTAS = ("max_running_steps", "max_unfinished_jobs", "max_stored_bytes")


def upgrade() -> None:
    for name in _QUOTAS:
        op.add_column("tenants", sa.Column(name, sa.BigInteger(), nullable=True))
    op.create_index("ix_jobs_tenant_state", "jobs", ["tenant_id", "state", "created_at", "id"])
    op.create_index(
        "ix_jobs_unfinished",
        "jobs",
        ["tenant_id"],
        postgresql_where=_IS_UNFINISHED,
        sqlite_where=_IS_UNFINISHED,
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_unfinished", table_name="jobs", postgresql_where=_IS_UNFINISHED, sqlite_where=_IS_UNFINISHED)
    op.drop_index("ix_jobs_tenant_state", table_name="jobs")
    for name in reversed(_QUOTAS):
        op.drop_column("tenants", name)
