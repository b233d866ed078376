"""Jobs remember the trace of the request that submitted them; chores are done by one worker at a time."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from service.ledger.clock import Instant

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

_IS_WAITING = sa.text("state = 'waiting'")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("traceparent", sa.String(55), nullable=True))
    op.create_table(
        "chores",
        sa.Column("name", sa.String(32), nullable=False),
        sa.Column("begun_at", Instant(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_chores"),
    )
    op.create_index(
        "ix_steps_waiting", "steps", ["resource_class"], postgresql_where=_IS_WAITING, sqlite_where=_IS_WAITING
    )


def downgrade() -> None:
    op.drop_index("ix_steps_waiting", table_name="steps", postgresql_where=_IS_WAITING, sqlite_where=_IS_WAITING)
    op.drop_table("chores")
    op.drop_column("jobs", "traceparent")
