"""Schedules: jobs that are submitted again by themselves."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from service.ledger.clock import Instant

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_DOCUMENT = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
_ACTIVE = sa.text("paused_at IS NULL")


def upgrade() -> None:
    op.create_table(
        "schedules",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("request", _DOCUMENT, nullable=False),
        sa.Column("cron", sa.String(length=200), nullable=True),
        sa.Column("time_zone", sa.String(length=64), nullable=False),
        sa.Column("every_s", sa.BigInteger(), nullable=True),
        sa.Column("missed", sa.String(length=8), nullable=False),
        sa.Column("overlap", sa.String(length=8), nullable=False),
        sa.Column("next_at", Instant(), nullable=False),
        sa.Column("tick_count", sa.BigInteger(), nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.Column("paused_at", Instant(), nullable=True),
        sa.CheckConstraint("(cron IS NULL) <> (every_s IS NULL)", name=op.f("ck_schedules_timing")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_schedules_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedules")),
        sa.UniqueConstraint("tenant_id", "name", name=op.f("uq_schedules_tenant_id_name")),
    )
    op.create_index("ix_schedules_due", "schedules", ["next_at"], postgresql_where=_ACTIVE, sqlite_where=_ACTIVE)
    op.create_table(
        "schedule_ticks",
        sa.Column("schedule_id", sa.String(length=32), nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("tick_at", Instant(), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("job_id", sa.String(length=32), nullable=True),
        sa.Column("error", _DOCUMENT, nullable=True),
        sa.Column("created_at", Instant(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_schedule_ticks_job_id_jobs")),
        sa.ForeignKeyConstraint(
            ["schedule_id"], ["schedules.id"], name=op.f("fk_schedule_ticks_schedule_id_schedules")
        ),
        sa.PrimaryKeyConstraint("schedule_id", "number", name=op.f("pk_schedule_ticks")),
    )
    op.create_index("ix_schedule_ticks_job", "schedule_ticks", ["job_id"])
    op.create_table(
        "schedule_uploads",
        sa.Column("schedule_id", sa.String(length=32), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["schedule_id"], ["schedules.id"], name=op.f("fk_schedule_uploads_schedule_id_schedules")
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "digest"],
            ["uploads.tenant_id", "uploads.digest"],
            name=op.f("fk_schedule_uploads_tenant_id_uploads"),
        ),
        sa.PrimaryKeyConstraint("schedule_id", "digest", name=op.f("pk_schedule_uploads")),
    )
    op.create_index("ix_schedule_uploads_upload", "schedule_uploads", ["tenant_id", "digest"])


def downgrade() -> None:
    for table in ("schedule_uploads", "schedule_ticks", "schedules"):
        op.drop_table(table)
