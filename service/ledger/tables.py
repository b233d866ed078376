"""The ledger's tables.

Owns the schema as Python sees it; `migrations/` owns it as the database sees it, and a test proves them
equal. Rows are read and written with SQLAlchemy Core (no identity map), only inside `service.ledger`.
Digests are full SHA-256 hex. `tenant_id` stands in every row that a tenant can see.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import (
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from service.ledger.base import Base
from service.ledger.states import FINAL_JOB_STATES, FINAL_STEP_STATES, FINAL_VARIANT_STATES


def _is_one_of(column: str, states: tuple[str, ...]) -> str:
    names = ", ".join(f"'{state}'" for state in states)
    return f"({column} IN ({names}))"


def _finalized_check(states: tuple[str, ...]) -> str:
    return f"{_is_one_of('state', states)} = (finalized_at IS NOT NULL)"


class Tenant(Base):
    """Who owns work; nothing of one tenant is visible to another."""

    __tablename__ = "tenants"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    created_at: Mapped[dt.datetime]
    #: Quotas; None: no limit.
    max_running_steps: Mapped[int | None]
    max_unfinished_jobs: Mapped[int | None]
    max_stored_bytes: Mapped[int | None]
    max_schedules: Mapped[int | None]


class ApiKey(Base):
    """A hashed key; the key itself is shown once, when it is made."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(String(200))
    #: First characters of the key, to find the row.
    prefix: Mapped[str] = mapped_column(String(16), unique=True)
    #: SHA-256 of the whole key; 32 random bytes need no slow hash.
    key_digest: Mapped[str] = mapped_column(String(64))
    #: What its holder may do, as `service.ledger.access.Scope` names it, with blanks between.
    scopes: Mapped[str] = mapped_column(String(64), server_default="read write")
    created_at: Mapped[dt.datetime]
    expires_at: Mapped[dt.datetime | None]
    #: To the minute.
    last_used_at: Mapped[dt.datetime | None]
    #: The key that a rotation has put in its place.
    replaced_by: Mapped[str | None] = mapped_column(String(32))
    revoked_at: Mapped[dt.datetime | None]


class SourceToken(Base):
    """A tenant's token for a kind of source, sealed with a key that is not in the ledger."""

    __tablename__ = "source_tokens"
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    #: `hub`.
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    sealed: Mapped[str] = mapped_column(Text)
    #: The beginning of its SHA-256, for people.
    fingerprint: Mapped[str] = mapped_column(String(32))
    #: When it was last set.
    created_at: Mapped[dt.datetime]


class Job(Base):
    """One conversion request."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(_finalized_check(FINAL_JOB_STATES), name="finalized"),
        Index("ix_jobs_tenant_created", "tenant_id", "created_at", "id"),
        Index("ix_jobs_tenant_state", "tenant_id", "state", "created_at", "id"),
        Index(
            "ix_jobs_unfinished",
            "tenant_id",
            postgresql_where=text("finalized_at IS NULL"),
            sqlite_where=text("finalized_at IS NULL"),
        ),
    )
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    #: The canonical `JobRequest`.
    request: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(16))
    #: Higher runs first.
    priority: Mapped[int] = mapped_column(default=0)
    #: The pinned source, once `resolve` has run.
    source: Mapped[dict[str, Any] | None]
    #: W3C trace context of the request that submitted it; None where nothing is traced.
    traceparent: Mapped[str | None] = mapped_column(String(55))
    #: Number of the last event; gapless because it is raised under the job's row lock.
    event_count: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[dt.datetime]
    finalized_at: Mapped[dt.datetime | None]


class IdempotencyKey(Base):
    """A client's promise that two submissions are one."""

    __tablename__ = "idempotency_keys"
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    request_digest: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", deferrable=True, initially="DEFERRED"))
    created_at: Mapped[dt.datetime]


class Variant(Base):
    """One cell of a job's matrix."""

    __tablename__ = "variants"
    __table_args__ = (
        UniqueConstraint("job_id", "name"),
        CheckConstraint(_finalized_check(FINAL_VARIANT_STATES), name="finalized"),
    )
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    #: Order in the request.
    position: Mapped[int]
    name: Mapped[str] = mapped_column(String(100))
    #: As asked; `auto` is replaced when the plan is known.
    engine: Mapped[str] = mapped_column(String(32))
    recipe: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[dt.datetime]
    finalized_at: Mapped[dt.datetime | None]


class Host(Base):
    """A machine that runs workers; its row is locked while one of them claims."""

    __tablename__ = "hosts"
    id: Mapped[str] = mapped_column(String(100), primary_key=True)
    cores: Mapped[int]
    memory_bytes: Mapped[int]


class Worker(Base):
    """A worker process."""

    __tablename__ = "workers"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    host_id: Mapped[str] = mapped_column(ForeignKey("hosts.id"))
    #: Resource class -> steps at once.
    slots: Mapped[dict[str, Any]]
    #: Package -> version, and step kind -> code revision.
    toolchain: Mapped[dict[str, Any]]
    toolchain_id: Mapped[str] = mapped_column(String(64))
    #: `strong` or `weak`, with reasons.
    isolation: Mapped[dict[str, Any]]
    #: Anonymous memory one of its steps may use; None: registered before this was known, and not counted on.
    memory_limit_bytes: Mapped[int | None]
    #: Of the file system with its work folder; None: not said.
    disk_bytes: Mapped[int | None]
    disk_free_bytes: Mapped[int | None]
    started_at: Mapped[dt.datetime]
    heartbeat_at: Mapped[dt.datetime]
    #: Since when it claims nothing and only finishes what it runs.
    draining_at: Mapped[dt.datetime | None]
    #: When it ended in good order; one that vanished is only silent.
    ended_at: Mapped[dt.datetime | None]


class Device(Base):
    """A phone, by its hardware's serial number, however it is connected; its row is locked while it is claimed."""

    __tablename__ = "devices"
    id: Mapped[str] = mapped_column(String(100), primary_key=True)
    #: What it is, as `workers.devices.android` reads it; what selectors are held against.
    record: Mapped[dict[str, Any]]
    #: Names that operators give it.
    tags: Mapped[list[Any]]
    #: A `DeviceState`.
    state: Mapped[str] = mapped_column(String(16))
    #: Why it is not ready; for people.
    reason: Mapped[str | None] = mapped_column(Text)
    #: How adb reaches it: its serial numbers there.
    connections: Mapped[list[Any]]
    #: The device worker that follows it; no other may claim for it.
    worker_id: Mapped[str | None] = mapped_column(ForeignKey("workers.id"))
    registered_at: Mapped[dt.datetime]
    seen_at: Mapped[dt.datetime]


class Tool(Base):
    """A program that measures on devices, by version and the machine code it is made of."""

    __tablename__ = "tools"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    version: Mapped[str] = mapped_column(String(64))
    abi: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[dt.datetime]
    __table_args__ = (UniqueConstraint("name", "version", "abi"),)


class ToolFile(Base):
    """The program itself, or a library that must lie beside it."""

    __tablename__ = "tool_files"
    __table_args__ = (Index("ix_tool_files_digest", "digest"),)
    tool_id: Mapped[str] = mapped_column(ForeignKey("tools.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    digest: Mapped[str] = mapped_column(ForeignKey("blobs.digest"))
    size_bytes: Mapped[int]


class Step(Base):
    """The unit of work."""

    __tablename__ = "steps"
    __table_args__ = (
        CheckConstraint(_finalized_check(FINAL_STEP_STATES), name="finalized"),
        CheckConstraint("(state = 'running') = (lease_expires_at IS NOT NULL)", name="leased"),
        # Equal keys are the same work, among those that live or have succeeded.
        Index(
            "uq_steps_shared_key",
            "tenant_id",
            "key",
            unique=True,
            postgresql_where=text("shared AND retired_at IS NULL AND state NOT IN ('failed', 'cancelled')"),
            sqlite_where=text("shared AND retired_at IS NULL AND state NOT IN ('failed', 'cancelled')"),
        ),
        # What claims read, in the order of claiming: unfinished steps only.
        Index(
            "ix_steps_queue",
            "resource_class",
            "tenant_id",
            "rank",
            "queued_at",
            "id",
            postgresql_where=text("state IN ('queued', 'running')"),
            sqlite_where=text("state IN ('queued', 'running')"),
        ),
        # What a scrape counts.
        Index(
            "ix_steps_waiting",
            "resource_class",
            postgresql_where=text("state = 'waiting'"),
            sqlite_where=text("state = 'waiting'"),
        ),
        # No more rows than the fleet has slots.
        Index(
            "ix_steps_running",
            "tenant_id",
            "resource_class",
            postgresql_where=text("state = 'running'"),
            sqlite_where=text("state = 'running'"),
        ),
        # What the history of measurements reads, backwards.
        Index(
            "ix_steps_measured",
            "tenant_id",
            "finalized_at",
            "id",
            postgresql_where=text("kind = 'benchmark' AND state = 'succeeded'"),
            sqlite_where=text("kind = 'benchmark' AND state = 'succeeded'"),
        ),
        # A device is leased by the step that runs on it, and by one alone.
        Index(
            "uq_steps_device",
            "device_id",
            unique=True,
            postgresql_where=text("state = 'running' AND device_id IS NOT NULL"),
            sqlite_where=text("state = 'running' AND device_id IS NOT NULL"),
        ),
    )
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    kind: Mapped[str] = mapped_column(String(16))
    key: Mapped[str] = mapped_column(String(64))
    #: Whether other jobs of the tenant may join it.
    shared: Mapped[bool]
    params: Mapped[dict[str, Any]]
    resource_class: Mapped[str] = mapped_column(String(16))
    state: Mapped[str] = mapped_column(String(16))
    #: The highest priority that any of its jobs had.
    priority: Mapped[int] = mapped_column(default=0)
    #: Place among its tenant's steps, smaller first: by priority, then bundles, which take a moment and are waited for.
    rank: Mapped[int] = mapped_column(server_default="0")
    #: Fencing token: raised by every claim, demanded by every later write.
    token: Mapped[int] = mapped_column(default=0)
    worker_id: Mapped[str | None] = mapped_column(ForeignKey("workers.id"))
    #: The phone that it runs on, or ran on last; a step outlives what is known of a phone.
    device_id: Mapped[str | None] = mapped_column(String(100))
    lease_expires_at: Mapped[dt.datetime | None]
    #: Set when a benchmark's tool starts: from here on the attempt is never repeated by itself.
    pinned_at: Mapped[dt.datetime | None]
    #: Not before this instant (a pause after a transient error).
    run_after: Mapped[dt.datetime | None]
    #: Crashes of its child and transient errors.
    failure_count: Mapped[int] = mapped_column(default=0)
    #: Workers lost in a row while they held it.
    loss_count: Mapped[int] = mapped_column(default=0)
    #: Last progress: `message`, `fraction`.
    progress: Mapped[dict[str, Any] | None]
    #: Anonymous memory it is expected to use at its peak, by the plan that made it; None where nobody predicts.
    predicted_peak_anon_bytes: Mapped[int | None]
    #: What the step found out; present when it succeeded.
    figures: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    #: Toolchain and code revision that the key was made with.
    toolchain_id: Mapped[str] = mapped_column(String(64))
    revision: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[dt.datetime]
    queued_at: Mapped[dt.datetime | None]
    finalized_at: Mapped[dt.datetime | None]
    #: Set when its blobs were given up; such a step is never joined.
    retired_at: Mapped[dt.datetime | None]


class Turn(Base):
    """When a tenant's step of a class was last claimed: who has waited longest is next."""

    __tablename__ = "turns"
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    resource_class: Mapped[str] = mapped_column(String(16), primary_key=True)
    taken_at: Mapped[dt.datetime]


class StepInput(Base):
    """An edge of the graph: `step_id` needs the outputs of `input_id` under `name`."""

    __tablename__ = "step_inputs"
    __table_args__ = (Index("ix_step_inputs_input", "input_id"),)
    step_id: Mapped[str] = mapped_column(ForeignKey("steps.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    input_id: Mapped[str] = mapped_column(ForeignKey("steps.id"))


class Blob(Base):
    """Bytes in the object store; the row is never before the bytes, and outlives them."""

    __tablename__ = "blobs"
    __table_args__ = (
        CheckConstraint("swept_at IS NULL OR condemned_at IS NOT NULL", name="swept"),
        Index(
            "ix_blobs_condemned",
            "condemned_at",
            postgresql_where=text("condemned_at IS NOT NULL AND swept_at IS NULL"),
            sqlite_where=text("condemned_at IS NOT NULL AND swept_at IS NULL"),
        ),
    )
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    size_bytes: Mapped[int]
    created_at: Mapped[dt.datetime]
    #: Set by the sweep of unreferenced blobs; a commit refuses a condemned digest.
    condemned_at: Mapped[dt.datetime | None]
    #: Set when the bytes were deleted; who uploads them again clears both.
    swept_at: Mapped[dt.datetime | None]


class Upload(Base):
    """A tenant's own input: calibration text, prompts, an evaluation, a text."""

    __tablename__ = "uploads"
    __table_args__ = (Index("ix_uploads_digest", "digest"),)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    digest: Mapped[str] = mapped_column(ForeignKey("blobs.digest"), primary_key=True)
    size_bytes: Mapped[int]
    #: As the tenant called it last; for people.
    name: Mapped[str | None] = mapped_column(String(200))
    #: When it was last uploaded.
    created_at: Mapped[dt.datetime]


class ResumableUpload(Base):
    """A file that a tenant sends in pieces; once they are all there, an upload is made of them."""

    __tablename__ = "resumable_uploads"
    __table_args__ = (
        Index("ix_resumable_uploads_tenant", "tenant_id", "created_at"),
        Index("ix_resumable_uploads_expires", "expires_at"),
    )
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    #: As the tenant calls it; for people.
    name: Mapped[str | None] = mapped_column(String(200))
    #: As announced.
    size_bytes: Mapped[int]
    #: What has arrived. Who adds a part demands that nobody else has.
    offset_bytes: Mapped[int]
    #: What the whole must be, if the sender has said so.
    announced_digest: Mapped[str | None] = mapped_column(String(64))
    #: The upload that was made of it.
    digest: Mapped[str | None] = mapped_column(String(64))
    #: Why none could be made.
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[dt.datetime]
    #: Each part puts it off.
    expires_at: Mapped[dt.datetime]
    #: While somebody makes the upload; put off for as long as the maker lives.
    assembled_until: Mapped[dt.datetime | None]
    #: How often making it has failed for what passes.
    failed_tries: Mapped[int] = mapped_column(server_default="0")


class UploadPart(Base):
    """A piece of a resumable upload that has arrived."""

    __tablename__ = "upload_parts"
    __table_args__ = (Index("ix_upload_parts_digest", "digest"),)
    upload_id: Mapped[str] = mapped_column(ForeignKey("resumable_uploads.id"), primary_key=True)
    offset_bytes: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    digest: Mapped[str] = mapped_column(ForeignKey("blobs.digest"))
    size_bytes: Mapped[int]


class JobUpload(Base):
    """A job's hold on an upload: as long as the job is kept, its inputs are."""

    __tablename__ = "job_uploads"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "digest"], ["uploads.tenant_id", "uploads.digest"]),
        Index("ix_job_uploads_upload", "tenant_id", "digest"),
    )
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(64))


class Schedule(Base):
    """A job that is submitted again by itself, at ticks of a clock or of an interval."""

    __tablename__ = "schedules"
    __table_args__ = (
        UniqueConstraint("tenant_id", "name"),
        CheckConstraint("(cron IS NULL) <> (every_s IS NULL)", name="timing"),
        # What every sweep reads.
        Index(
            "ix_schedules_due",
            "next_at",
            postgresql_where=text("paused_at IS NULL"),
            sqlite_where=text("paused_at IS NULL"),
        ),
    )
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(String(100))
    #: The canonical `JobRequest` of every tick.
    request: Mapped[dict[str, Any]]
    #: Five fields, read by the clock of `time_zone`; None for an interval.
    cron: Mapped[str | None] = mapped_column(String(200))
    #: IANA name.
    time_zone: Mapped[str] = mapped_column(String(64))
    #: Seconds from tick to tick, counted from `created_at`; None for a cron expression.
    every_s: Mapped[int | None]
    #: Of ticks that no worker fired in time: `once` submits one job for all, `skip` none.
    missed: Mapped[str] = mapped_column(String(8))
    #: While the job of an earlier tick has not ended: `skip` leaves a tick out, `allow` submits.
    overlap: Mapped[str] = mapped_column(String(8))
    #: The oldest tick that was not fired. Who fires it moves it on, and demands that nobody has.
    next_at: Mapped[dt.datetime]
    #: Number of the last tick that was fired.
    tick_count: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[dt.datetime]
    #: Set while no tick is to be fired.
    paused_at: Mapped[dt.datetime | None]


class ScheduleTick(Base):
    """What became of a schedule's tick; the last hundred are kept."""

    __tablename__ = "schedule_ticks"
    __table_args__ = (Index("ix_schedule_ticks_job", "job_id"),)
    schedule_id: Mapped[str] = mapped_column(ForeignKey("schedules.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    #: When it was due.
    tick_at: Mapped[dt.datetime]
    #: A `TickOutcome`.
    outcome: Mapped[str] = mapped_column(String(16))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    error: Mapped[dict[str, Any] | None]
    #: When it was fired.
    created_at: Mapped[dt.datetime]


class ScheduleUpload(Base):
    """A schedule's hold on an upload, as a job's."""

    __tablename__ = "schedule_uploads"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "digest"], ["uploads.tenant_id", "uploads.digest"]),
        Index("ix_schedule_uploads_upload", "tenant_id", "digest"),
    )
    schedule_id: Mapped[str] = mapped_column(ForeignKey("schedules.id"), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(64))


class StepOutput(Base):
    """A file that a step made."""

    __tablename__ = "step_outputs"
    __table_args__ = (Index("ix_step_outputs_digest", "digest"),)
    step_id: Mapped[str] = mapped_column(ForeignKey("steps.id"), primary_key=True)
    #: Relative path in the step's output folder.
    name: Mapped[str] = mapped_column(String(500), primary_key=True)
    digest: Mapped[str] = mapped_column(ForeignKey("blobs.digest"))
    size_bytes: Mapped[int]


class Attempt(Base):
    """One claim of a step."""

    __tablename__ = "attempts"
    __table_args__ = (Index("ix_attempts_log_digest", "log_digest"),)
    step_id: Mapped[str] = mapped_column(ForeignKey("steps.id"), primary_key=True)
    token: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    worker_id: Mapped[str] = mapped_column(ForeignKey("workers.id"))
    state: Mapped[str] = mapped_column(String(16))
    error: Mapped[dict[str, Any] | None]
    isolation: Mapped[str | None] = mapped_column(String(16))
    #: VmHWM, which counts mapped files.
    peak_rss_bytes: Mapped[int | None]
    #: Sampled RssAnon + RssShmem over the process tree.
    peak_anon_bytes: Mapped[int | None]
    #: Wall time of the child.
    duration_s: Mapped[float | None]
    log_digest: Mapped[str | None] = mapped_column(ForeignKey("blobs.digest"))
    #: Until its log is stored: the end of what the child has printed, and how many bytes that is in all.
    live_log: Mapped[str | None] = mapped_column(Text)
    live_log_bytes: Mapped[int | None]
    started_at: Mapped[dt.datetime]
    finished_at: Mapped[dt.datetime | None]


class JobStep(Base):
    """A job's link to a step, of its own or shared."""

    __tablename__ = "job_steps"
    __table_args__ = (Index("ix_job_steps_step", "step_id"),)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step_id: Mapped[str] = mapped_column(ForeignKey("steps.id"), primary_key=True)
    #: Order in the job's graph, for people.
    position: Mapped[int]
    #: The step had been made by an earlier request.
    reused: Mapped[bool]
    #: Replaced by a retry; kept for its log.
    superseded: Mapped[bool] = mapped_column(default=False)


class VariantStep(Base):
    """Which variants a linked step serves."""

    __tablename__ = "variant_steps"
    __table_args__ = (Index("ix_variant_steps_step", "step_id"),)
    variant_id: Mapped[str] = mapped_column(ForeignKey("variants.id"), primary_key=True)
    step_id: Mapped[str] = mapped_column(ForeignKey("steps.id"), primary_key=True)


class Publication(Base):
    """An artifact that became, or is about to become, visible: once per job, variant and kind."""

    __tablename__ = "publications"
    __table_args__ = (
        UniqueConstraint("variant_id", "kind"),
        Index("ix_publications_job", "job_id"),
        Index("ix_publications_step", "step_id"),
        Index("ix_publications_digest", "digest"),
    )
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    variant_id: Mapped[str] = mapped_column(ForeignKey("variants.id"))
    step_id: Mapped[str] = mapped_column(ForeignKey("steps.id"))
    kind: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(300))
    digest: Mapped[str] = mapped_column(ForeignKey("blobs.digest"))
    size_bytes: Mapped[int]
    #: Recorded before the manifest is uploaded and reused by a retry.
    manifest_digest: Mapped[str] = mapped_column(String(64))
    manifest: Mapped[str] = mapped_column(Text)
    #: Of the artifact and its manifest, where the operator signs; a Sigstore bundle.
    signature: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[dt.datetime]
    #: Set by the fenced finish; until then nobody sees the artifact.
    published_at: Mapped[dt.datetime | None]


class Chore(Base):
    """When something that one worker does for all was begun last."""

    __tablename__ = "chores"
    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    begun_at: Mapped[dt.datetime]


class Event(Base):
    """What happened to a job, in order."""

    __tablename__ = "events"
    __table_args__ = (
        # What housekeeping reads.
        Index(
            "ix_events_progress",
            "job_id",
            postgresql_where=text("kind = 'progress'"),
            sqlite_where=text("kind = 'progress'"),
        ),
    )
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    kind: Mapped[str] = mapped_column(String(32))
    data: Mapped[dict[str, Any]]
    created_at: Mapped[dt.datetime]
