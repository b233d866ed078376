"""Uploads, and what the sweep of unreferenced blobs needs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from service.ledger.clock import Instant

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_CONDEMNED = sa.text("condemned_at IS NOT NULL AND swept_at IS NULL")
#: Who may refer to a blob; the sweep asks each for every digest.
_REFERENCES = (("step_outputs", "digest"), ("attempts", "log_digest"), ("publications", "digest"))


def upgrade() -> None:
    op.create_table(
        "uploads",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=True),
        sa.Column("created_at", Instant(), nullable=False),
        sa.ForeignKeyConstraint(["digest"], ["blobs.digest"], name=op.f("fk_uploads_digest_blobs")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_uploads_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("tenant_id", "digest", name=op.f("pk_uploads")),
    )
    op.create_index("ix_uploads_digest", "uploads", ["digest"])
    op.create_table(
        "job_uploads",
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_uploads_job_id_jobs")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "digest"],
            ["uploads.tenant_id", "uploads.digest"],
            name=op.f("fk_job_uploads_tenant_id_uploads"),
        ),
        sa.PrimaryKeyConstraint("job_id", "digest", name=op.f("pk_job_uploads")),
    )
    op.create_index("ix_job_uploads_upload", "job_uploads", ["tenant_id", "digest"])
    for table, column in _REFERENCES:
        op.create_index(f"ix_{table}_{column}", table, [column])
    with op.batch_alter_table("blobs") as blobs:
        blobs.add_column(sa.Column("swept_at", Instant(), nullable=True))
        blobs.create_check_constraint(op.f("ck_blobs_swept"), "swept_at IS NULL OR condemned_at IS NOT NULL")
    op.create_index(
        "ix_blobs_condemned", "blobs", ["condemned_at"], postgresql_where=_CONDEMNED, sqlite_where=_CONDEMNED
    )


def downgrade() -> None:
    op.drop_index("ix_blobs_condemned", table_name="blobs", postgresql_where=_CONDEMNED, sqlite_where=_CONDEMNED)
    with op.batch_alter_table("blobs") as blobs:
        blobs.drop_constraint(op.f("ck_blobs_swept"), type_="check")
        blobs.drop_column("swept_at")
    for table, column in reversed(_REFERENCES):
        op.drop_index(f"ix_{table}_{column}", table_name=table)
    op.drop_index("ix_job_uploads_upload", table_name="job_uploads")
    op.drop_table("job_uploads")
    op.drop_index("ix_uploads_digest", table_name="uploads")
    op.drop_table("uploads")
