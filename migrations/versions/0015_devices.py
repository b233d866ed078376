"""Phones, the tools that measure on them, and which step holds which phone."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from service.ledger.clock import Instant

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

_DOCUMENT = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
_IS_LEASED = sa.text("state = 'running' AND device_id IS NOT NULL")


def upgrade() -> None:
    op.create_table(
        "devices",
        sa.Column("id", sa.String(100), nullable=False),
        sa.Column("record", _DOCUMENT, nullable=False),
        sa.Column("tags", _DOCUMENT, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("connections", _DOCUMENT, nullable=False),
        sa.Column("worker_id", sa.String(32), nullable=True),
        sa.Column("registered_at", Instant(), nullable=False),
        sa.Column("seen_at", Instant(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_devices")),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name=op.f("fk_devices_worker_id_workers")),
    )
    op.create_table(
        "tools",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("abi", sa.String(32), nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tools")),
        sa.UniqueConstraint("name", "version", "abi", name=op.f("uq_tools_name_version_abi")),
    )
    op.create_table(
        "tool_files",
        sa.Column("tool_id", sa.String(32), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tool_id", "name", name=op.f("pk_tool_files")),
        sa.ForeignKeyConstraint(["tool_id"], ["tools.id"], name=op.f("fk_tool_files_tool_id_tools")),
        sa.ForeignKeyConstraint(["digest"], ["blobs.digest"], name=op.f("fk_tool_files_digest_blobs")),
    )
    op.create_index("ix_tool_files_digest", "tool_files", ["digest"])
    op.add_column("steps", sa.Column("device_id", sa.String(100), nullable=True))
    op.create_index(
        "uq_steps_device",
        "steps",
        ["device_id"],
        unique=True,
        postgresql_where=_IS_LEASED,
        sqlite_where=_IS_LEASED,
    )


def downgrade() -> None:
    op.drop_index("uq_steps_device", table_name="steps", postgresql_where=_IS_LEASED, sqlite_where=_IS_LEASED)
    op.drop_column("steps", "device_id")
    for name in ("tool_files", "tools", "devices"):
        op.drop_table(name)
