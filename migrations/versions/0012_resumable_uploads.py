"""Resumable uploads and their parts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from service.ledger.base import Document
from service.ledger.clock import Instant

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "resumable_uploads",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=True),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("offset_bytes", sa.BigInteger(), nullable=False),
        sa.Column("announced_digest", sa.String(length=64), nullable=True),
        sa.Column("digest", sa.String(length=64), nullable=True),
        sa.Column("error", Document(), nullable=True),
        sa.Column("created_at", Instant(), nullable=False),
        sa.Column("expires_at", Instant(), nullable=False),
        sa.Column("assembled_until", Instant(), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_resumable_uploads_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_resumable_uploads")),
    )
    op.create_index("ix_resumable_uploads_tenant", "resumable_uploads", ["tenant_id", "created_at"])
    op.create_index("ix_resumable_uploads_expires", "resumable_uploads", ["expires_at"])
    op.create_table(
        "upload_parts",
        sa.Column("upload_id", sa.String(length=32), nullable=False),
        sa.Column("offset_bytes", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["digest"], ["blobs.digest"], name=op.f("fk_upload_parts_digest_blobs")),
        sa.ForeignKeyConstraint(
            ["upload_id"], ["resumable_uploads.id"], name=op.f("fk_upload_parts_upload_id_resumable_uploads")
        ),
        sa.PrimaryKeyConstraint("upload_id", "offset_bytes", name=op.f("pk_upload_parts")),
    )
    op.create_index("ix_upload_parts_digest", "upload_parts", ["digest"])


def downgrade() -> None:
    op.drop_table("upload_parts")
    op.drop_table("resumable_uploads")
