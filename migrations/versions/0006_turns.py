"""Tenants take turns; the queue of unfinished steps has an index in the order of claiming."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from service.ledger.clock import Instant

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_IS_LIVE = sa.text("state IN ('queued', 'running')")
_IS_RUNNING = sa.text("state = 'running'")


def upgrade() -> None:
    op.create_table(
        "turns",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("resource_class", sa.String(length=16), nullable=False),
        sa.Column("taken_at", Instant(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_turns_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("tenant_id", "resource_class", name=op.f("pk_turns")),
    )
    # The default serves workers of the version before, which go on for a while.
    op.add_column("steps", sa.Column("rank", sa.BigInteger(), server_default="0", nullable=False))
    op.execute(
        "UPDATE steps SET rank = -2 * priority - CASE kind WHEN 'bundle' THEN 1 ELSE 0 END "
        "WHERE state IN ('waiting', 'queued', 'running')"
    )
    op.drop_index("ix_steps_due", table_name="steps", postgresql_where=_IS_LIVE, sqlite_where=_IS_LIVE)
    op.create_index(
        "ix_steps_queue",
        "steps",
        ["resource_class", "tenant_id", "rank", "queued_at", "id"],
        postgresql_where=_IS_LIVE,
        sqlite_where=_IS_LIVE,
    )
    op.create_index(
        "ix_steps_running",
        "steps",
        ["tenant_id", "resource_class"],
        postgresql_where=_IS_RUNNING,
        sqlite_where=_IS_RUNNING,
    )


def downgrade() -> None:
    op.drop_index("ix_steps_running", table_name="steps", postgresql_where=_IS_RUNNING, sqlite_where=_IS_RUNNING)
    op.drop_index("ix_steps_queue", table_name="steps", postgresql_where=_IS_LIVE, sqlite_where=_IS_LIVE)
    op.create_index(
        "ix_steps_due",
        "steps",
        ["resource_class", "priority", "queued_at"],
        postgresql_where=_IS_LIVE,
        sqlite_where=_IS_LIVE,
    )
    op.drop_column("steps", "rank")
    op.drop_table("turns")
