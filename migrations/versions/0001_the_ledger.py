"""The ledger: tenants, jobs, variants, steps, attempts, blobs, publications, events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from service.ledger.clock import Instant

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_DOCUMENT = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "blobs",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.Column("condemned_at", Instant(), nullable=True),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_blobs")),
    )
    op.create_table(
        "hosts",
        sa.Column("id", sa.String(length=100), nullable=False),
        sa.Column("cores", sa.BigInteger(), nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_hosts")),
    )
    op.create_table(
        "tenants",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tenants")),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("prefix", sa.String(length=16), nullable=False),
        sa.Column("key_digest", sa.String(length=64), nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.Column("expires_at", Instant(), nullable=True),
        sa.Column("revoked_at", Instant(), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_api_keys_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("prefix", name=op.f("uq_api_keys_prefix")),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("request", _DOCUMENT, nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("priority", sa.BigInteger(), nullable=False),
        sa.Column("source", _DOCUMENT, nullable=True),
        sa.Column("event_count", sa.BigInteger(), nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.Column("finalized_at", Instant(), nullable=True),
        sa.CheckConstraint(
            "(state IN ('succeeded', 'partial', 'failed', 'cancelled')) = (finalized_at IS NOT NULL)",
            name=op.f("ck_jobs_finalized"),
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_jobs_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    op.create_index("ix_jobs_tenant_created", "jobs", ["tenant_id", "created_at", "id"], unique=False)
    op.create_table(
        "workers",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("host_id", sa.String(length=100), nullable=False),
        sa.Column("slots", _DOCUMENT, nullable=False),
        sa.Column("toolchain", _DOCUMENT, nullable=False),
        sa.Column("toolchain_id", sa.String(length=64), nullable=False),
        sa.Column("isolation", _DOCUMENT, nullable=False),
        sa.Column("started_at", Instant(), nullable=False),
        sa.Column("heartbeat_at", Instant(), nullable=False),
        sa.ForeignKeyConstraint(["host_id"], ["hosts.id"], name=op.f("fk_workers_host_id_hosts")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )
    op.create_table(
        "events",
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("data", _DOCUMENT, nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_events_job_id_jobs")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_events_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("job_id", "number", name=op.f("pk_events")),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=200), nullable=False),
        sa.Column("request_digest", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_idempotency_keys_job_id_jobs"), initially="DEFERRED", deferrable=True
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_idempotency_keys_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("tenant_id", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_table(
        "steps",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("shared", sa.Boolean(), nullable=False),
        sa.Column("params", _DOCUMENT, nullable=False),
        sa.Column("resource_class", sa.String(length=16), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("priority", sa.BigInteger(), nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("worker_id", sa.String(length=32), nullable=True),
        sa.Column("lease_expires_at", Instant(), nullable=True),
        sa.Column("pinned_at", Instant(), nullable=True),
        sa.Column("run_after", Instant(), nullable=True),
        sa.Column("failure_count", sa.BigInteger(), nullable=False),
        sa.Column("loss_count", sa.BigInteger(), nullable=False),
        sa.Column("progress", _DOCUMENT, nullable=True),
        sa.Column("figures", _DOCUMENT, nullable=True),
        sa.Column("error", _DOCUMENT, nullable=True),
        sa.Column("toolchain_id", sa.String(length=64), nullable=False),
        sa.Column("revision", sa.String(length=64), nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.Column("queued_at", Instant(), nullable=True),
        sa.Column("finalized_at", Instant(), nullable=True),
        sa.Column("retired_at", Instant(), nullable=True),
        sa.CheckConstraint("(state = 'running') = (lease_expires_at IS NOT NULL)", name=op.f("ck_steps_leased")),
        sa.CheckConstraint(
            "(state IN ('succeeded', 'failed', 'cancelled')) = (finalized_at IS NOT NULL)",
            name=op.f("ck_steps_finalized"),
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_steps_tenant_id_tenants")),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name=op.f("fk_steps_worker_id_workers")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_steps")),
    )
    op.create_index(
        "ix_steps_due",
        "steps",
        ["resource_class", "priority", "queued_at"],
        unique=False,
        postgresql_where=sa.text("state IN ('queued', 'running')"),
        sqlite_where=sa.text("state IN ('queued', 'running')"),
    )
    op.create_index(
        "uq_steps_shared_key",
        "steps",
        ["tenant_id", "key"],
        unique=True,
        postgresql_where=sa.text("shared AND retired_at IS NULL AND state NOT IN ('failed', 'cancelled')"),
        sqlite_where=sa.text("shared AND retired_at IS NULL AND state NOT IN ('failed', 'cancelled')"),
    )
    op.create_table(
        "variants",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("engine", sa.String(length=32), nullable=False),
        sa.Column("recipe", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("error", _DOCUMENT, nullable=True),
        sa.Column("created_at", Instant(), nullable=False),
        sa.Column("finalized_at", Instant(), nullable=True),
        sa.CheckConstraint(
            "(state IN ('succeeded', 'refused', 'failed', 'cancelled')) = (finalized_at IS NOT NULL)",
            name=op.f("ck_variants_finalized"),
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_variants_job_id_jobs")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_variants_tenant_id_tenants")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_variants")),
        sa.UniqueConstraint("job_id", "name", name=op.f("uq_variants_job_id_name")),
    )
    op.create_table(
        "attempts",
        sa.Column("step_id", sa.String(length=32), nullable=False),
        sa.Column("token", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("worker_id", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("error", _DOCUMENT, nullable=True),
        sa.Column("isolation", sa.String(length=16), nullable=True),
        sa.Column("peak_rss_bytes", sa.BigInteger(), nullable=True),
        sa.Column("peak_anon_bytes", sa.BigInteger(), nullable=True),
        sa.Column("duration_s", sa.Float(precision=53), nullable=True),
        sa.Column("log_digest", sa.String(length=64), nullable=True),
        sa.Column("started_at", Instant(), nullable=False),
        sa.Column("finished_at", Instant(), nullable=True),
        sa.ForeignKeyConstraint(["log_digest"], ["blobs.digest"], name=op.f("fk_attempts_log_digest_blobs")),
        sa.ForeignKeyConstraint(["step_id"], ["steps.id"], name=op.f("fk_attempts_step_id_steps")),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name=op.f("fk_attempts_worker_id_workers")),
        sa.PrimaryKeyConstraint("step_id", "token", name=op.f("pk_attempts")),
    )
    op.create_table(
        "job_steps",
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("step_id", sa.String(length=32), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("reused", sa.Boolean(), nullable=False),
        sa.Column("superseded", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_steps_job_id_jobs")),
        sa.ForeignKeyConstraint(["step_id"], ["steps.id"], name=op.f("fk_job_steps_step_id_steps")),
        sa.PrimaryKeyConstraint("job_id", "step_id", name=op.f("pk_job_steps")),
    )
    op.create_index("ix_job_steps_step", "job_steps", ["step_id"], unique=False)
    op.create_table(
        "publications",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("variant_id", sa.String(length=32), nullable=False),
        sa.Column("step_id", sa.String(length=32), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=300), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("manifest_digest", sa.String(length=64), nullable=False),
        sa.Column("manifest", sa.Text(), nullable=False),
        sa.Column("created_at", Instant(), nullable=False),
        sa.Column("published_at", Instant(), nullable=True),
        sa.ForeignKeyConstraint(["digest"], ["blobs.digest"], name=op.f("fk_publications_digest_blobs")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_publications_job_id_jobs")),
        sa.ForeignKeyConstraint(["step_id"], ["steps.id"], name=op.f("fk_publications_step_id_steps")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_publications_tenant_id_tenants")),
        sa.ForeignKeyConstraint(["variant_id"], ["variants.id"], name=op.f("fk_publications_variant_id_variants")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_publications")),
        sa.UniqueConstraint("variant_id", "kind", name=op.f("uq_publications_variant_id_kind")),
    )
    op.create_table(
        "step_inputs",
        sa.Column("step_id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("input_id", sa.String(length=32), nullable=False),
        sa.ForeignKeyConstraint(["input_id"], ["steps.id"], name=op.f("fk_step_inputs_input_id_steps")),
        sa.ForeignKeyConstraint(["step_id"], ["steps.id"], name=op.f("fk_step_inputs_step_id_steps")),
        sa.PrimaryKeyConstraint("step_id", "name", name=op.f("pk_step_inputs")),
    )
    op.create_index("ix_step_inputs_input", "step_inputs", ["input_id"], unique=False)
    op.create_table(
        "step_outputs",
        sa.Column("step_id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=500), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["digest"], ["blobs.digest"], name=op.f("fk_step_outputs_digest_blobs")),
        sa.ForeignKeyConstraint(["step_id"], ["steps.id"], name=op.f("fk_step_outputs_step_id_steps")),
        sa.PrimaryKeyConstraint("step_id", "name", name=op.f("pk_step_outputs")),
    )
    op.create_table(
        "variant_steps",
        sa.Column("variant_id", sa.String(length=32), nullable=False),
        sa.Column("step_id", sa.String(length=32), nullable=False),
        sa.ForeignKeyConstraint(["step_id"], ["steps.id"], name=op.f("fk_variant_steps_step_id_steps")),
        sa.ForeignKeyConstraint(["variant_id"], ["variants.id"], name=op.f("fk_variant_steps_variant_id_variants")),
        sa.PrimaryKeyConstraint("variant_id", "step_id", name=op.f("pk_variant_steps")),
    )
    op.create_index("ix_variant_steps_step", "variant_steps", ["step_id"], unique=False)
    op.create_index("ix_publications_job", "publications", ["job_id"], unique=False)
    op.create_index("ix_publications_step", "publications", ["step_id"], unique=False)
    op.create_index(
        "ix_events_progress",
        "events",
        ["job_id"],
        unique=False,
        postgresql_where=sa.text("kind = 'progress'"),
        sqlite_where=sa.text("kind = 'progress'"),
    )


def downgrade() -> None:
    op.drop_index("ix_events_progress", table_name="events")
    op.drop_index("ix_publications_step", table_name="publications")
    op.drop_index("ix_publications_job", table_name="publications")
    op.drop_index("ix_variant_steps_step", table_name="variant_steps")
    op.drop_table("variant_steps")
    op.drop_table("step_outputs")
    op.drop_index("ix_step_inputs_input", table_name="step_inputs")
    op.drop_table("step_inputs")
    op.drop_table("publications")
    op.drop_index("ix_job_steps_step", table_name="job_steps")
    op.drop_table("job_steps")
    op.drop_table("attempts")
    op.drop_table("variants")
    op.drop_index(
        "uq_steps_shared_key",
        table_name="steps",
        postgresql_where=sa.text("shared AND retired_at IS NULL AND state NOT IN ('failed', 'cancelled')"),
        sqlite_where=sa.text("shared AND retired_at IS NULL AND state NOT IN ('failed', 'cancelled')"),
    )
    op.drop_index(
        "ix_steps_due",
        table_name="steps",
        postgresql_where=sa.text("state IN ('queued', 'running')"),
        sqlite_where=sa.text("state IN ('queued', 'running')"),
    )
    op.drop_table("steps")
    op.drop_table("idempotency_keys")
    op.drop_table("events")
    op.drop_table("workers")
    op.drop_index("ix_jobs_tenant_created", table_name="jobs")
    op.drop_table("jobs")
    op.drop_table("api_keys")
    op.drop_table("tenants")
    op.drop_table("hosts")
    op.drop_table("blobs")
