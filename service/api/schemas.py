"""The shapes of answers, for the OpenAPI document.

The ledger's views make the documents; these models describe them and tests hold the two together. Fields may be
added to documents, never renamed.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

TAGS = [
    {"name": "jobs", "description": "Submit conversions, follow them, stop them, try them again."},
    {"name": "uploads", "description": "Files that jobs name: calibration, evaluation, texts."},
    {"name": "artifacts", "description": "Proven artifacts and the manifests that say how each came to be."},
    {"name": "schedules", "description": "Jobs that are submitted again by themselves."},
    {"name": "fleet", "description": "Workers and what they run, phones and their tools."},
    {"name": "keys", "description": "API keys of one's own tenant; for operators."},
    {"name": "tokens", "description": "What a tenant's private sources are read with; written, never shown."},
    {"name": "catalogue", "description": "What a job may ask for."},
    {"name": "health", "description": "Whether the server lives and can do its work."},
]


class _Document(BaseModel):
    """A document that may grow."""

    model_config = ConfigDict(extra="allow")


class Problem(_Document):
    """RFC 9457 problem details."""

    type: str = Field(examples=["urn:edgekiln:error:not_found"])
    title: str = Field(examples=["Not found"])
    status: int = Field(examples=[404])
    detail: str = Field(description="What was wrong, where, and what to do.")
    code: str = Field(description="Stable identifier.", examples=["not_found"])
    retryable: bool = Field(description="Whether the same request, unchanged, may succeed later.")
    details: dict[str, Any] = Field(description="The place of the failure, for programs.")


class ErrorDocument(_Document):
    """Why a step or variant did not succeed."""

    code: str
    message: str
    retryable: bool
    details: dict[str, Any]


class Artifact(_Document):
    """A published file."""

    id: str
    name: str = Field(examples=["addition-dynamic_int8.litertlm"])
    kind: str = Field(description="`tflite`, `task` or `litertlm`.")
    sha256: str
    size_bytes: int
    url: str = Field(description="Where to download it, relative to the server.")
    manifest_sha256: str
    manifest_url: str
    signature_url: str | None = Field(description="Where it is signed: its signature.")
    measurements_url: str
    published_at: datetime | None


class JobArtifact(Artifact):
    """A published file, with the variant it belongs to."""

    variant: str


class ArtifactList(_Document):
    """Artifacts of one job."""

    artifacts: list[JobArtifact]


class UploadDocument(_Document):
    """A file of the tenant's own."""

    sha256: str
    size_bytes: int
    name: str | None
    created_at: datetime = Field(description="When it was last uploaded.")


class UploadList(_Document):
    """One page of uploads, newest first."""

    uploads: list[UploadDocument]
    next: str | None = Field(description="Give it as `before` to read the next page; null on the last one.")


class ResumableDocument(_Document):
    """A file that is sent in pieces."""

    id: str
    state: Literal["receiving", "assembling", "stored", "failed"]
    name: str | None
    size_bytes: int
    offset_bytes: int = Field(description="What has arrived.")
    sha256: str | None = Field(description="As announced.")
    upload: UploadDocument | None = Field(description="What became of it, once it is stored.")
    error: ErrorDocument | None
    assembled_until: datetime | None = Field(description="Moves on while a server puts the pieces together.")
    failed_tries: int = Field(description="How often that has failed for what passes, such as a full disk.")
    created_at: datetime
    expires_at: datetime = Field(description="Each piece puts it off.")


class ResumableList(_Document):
    """The tenant's unfinished uploads, newest first."""

    uploads: list[ResumableDocument]


class VariantDocument(_Document):
    """One cell of a job's matrix."""

    id: str
    name: str
    engine: str
    recipe: str
    state: Literal["pending", "running", "succeeded", "refused", "failed", "cancelled"]
    error: ErrorDocument | None
    artifacts: list[Artifact]
    parity: dict[str, Any] | None = Field(description="How far the graph's logits are from the source's.")
    quality: dict[str, Any] | None = Field(description="Accuracy of source and artifacts.")
    measurements: list[dict[str, Any]] = Field(description="Benchmarks: all samples, their median, conditions.")


class StepDocument(_Document):
    """A unit of work of a job."""

    id: str
    kind: str
    key: str = Field(description="Equal keys are the same work.")
    state: Literal["waiting", "queued", "running", "succeeded", "failed", "cancelled"]
    reused: bool = Field(description="An earlier request had made it.")
    attempts: int
    duration_s: float | None
    peak_rss_bytes: int | None
    peak_anon_bytes: int | None
    predicted_peak_anon_bytes: int | None = Field(description="By the plan, before it ran; null where none is made.")
    error: ErrorDocument | None


JobStateName = Literal["queued", "running", "succeeded", "partial", "failed", "cancelled"]


class JobSummary(_Document):
    """A job without its steps."""

    id: str
    state: JobStateName
    is_final: bool
    priority: int
    created_at: datetime
    finalized_at: datetime | None
    event_count: int
    request: dict[str, Any]


class JobListItem(JobSummary):
    """A job as lists show it."""

    variant_states: dict[str, int] = Field(description="Variant state -> number of variants.")


class JobList(_Document):
    """One page of jobs, newest first."""

    jobs: list[JobListItem]
    next: str | None = Field(description="Give it as `before` to read the next page; null on the last one.")


class JobDocument(JobSummary):
    """A job whole."""

    source: dict[str, Any] | None = Field(description="The source as it was pinned; null until then.")
    variants: list[VariantDocument]
    steps: list[StepDocument]


class CandidateDocument(_Document):
    """One artifact, published or not, with what it can be chosen by."""

    variant: str
    engine: str
    recipe: str
    format: str
    state: Literal["pending", "running", "succeeded", "refused", "failed", "cancelled"]
    error: ErrorDocument | None
    artifact: Artifact | None = Field(description="Null when the variant is not published: it is never picked.")
    figures: dict[str, float | None] = Field(description="Dotted name -> figure; null where nobody measured it.")
    measurement: str | None = Field(description="What the benchmark is worth: `stable`, `noisy`, `hot` or `short`.")


class ComparedDocument(CandidateDocument):
    """A candidate beside the others of its format."""

    is_pareto: bool | None = Field(description="Whether no other is better; null when it is not published.")
    dominated_by: list[str] = Field(description="Variants at least as good on every axis and better on one.")


class FrontDocument(_Document):
    """The artifacts of one format, compared."""

    format: str
    axes: list[str] = Field(description="The axes on which every published artifact has a figure.")
    missing: dict[str, list[str]] = Field(description="Axis that is not compared -> variants without its figure.")
    best: dict[str, list[str]] = Field(description="Figure -> published variants with the best one.")
    candidates: list[ComparedDocument]


class AxisDocument(_Document):
    """One direction in which an artifact can be better."""

    figure_name: str
    better: Literal["lower", "higher"]


class ComparisonDocument(_Document):
    """How a job's artifacts compare."""

    job_id: str
    state: JobStateName
    is_final: bool
    axes: dict[str, AxisDocument]
    formats: list[FrontDocument]


class VerdictDocument(_Document):
    """One threshold, held against one figure."""

    gate: str
    figure_name: str
    figure: float | None
    bound: Literal["at_most", "at_least"]
    threshold: float
    passed: bool
    sentence: str


class JudgedDocument(CandidateDocument):
    """A candidate, held against a wish."""

    constraints: list[VerdictDocument]
    objections: list[str] = Field(description="Why it cannot be picked, a sentence each.")


class PickDocument(_Document):
    """Which artifact to take."""

    job_id: str
    state: JobStateName
    is_final: bool
    format: str
    engine: str | None
    prefer: str
    bounds: dict[str, float]
    picked: JudgedDocument | None
    reason: str = Field(description="Why it wins, or why none does.")
    also_fit: list[JudgedDocument] = Field(description="The others that fit, the best first.")
    excluded: list[JudgedDocument]
    nearest: JudgedDocument | None = Field(description="When none fits: the published artifact that misses least.")


class AttemptLog(_Document):
    """What one attempt of a step wrote."""

    step_id: str
    kind: str
    attempt: int
    state: str
    error: ErrorDocument | None
    size_bytes: int | None = Field(description="Size of the whole log; null when there is none yet.")
    text: str | None = Field(description="The end of the log.")
    truncated: bool = Field(description="Whether `text` is less than the whole; ask for `text/plain` to get all.")
    is_complete: bool = Field(description="Whether nothing more will come; false while it runs or its end is stored.")


class LogList(_Document):
    """Logs of one job."""

    logs: list[AttemptLog]


class TickDocument(_Document):
    """What became of a schedule's tick."""

    tick_at: datetime = Field(description="When it was due.")
    outcome: Literal["submitted", "skipped", "missed", "refused"]
    job_id: str | None
    error: ErrorDocument | None = Field(description="Why the job was refused.")
    fired_at: datetime


class ScheduleSummary(_Document):
    """A job that is submitted again by itself."""

    id: str
    name: str
    state: Literal["active", "paused"]
    cron: str | None
    time_zone: str
    every_s: int | None
    missed: Literal["once", "skip"]
    overlap: Literal["skip", "allow"]
    job: dict[str, Any] = Field(description="The request that each tick submits.")
    next_ticks: list[datetime] = Field(description="The next five; none while it is paused.")
    created_at: datetime
    paused_at: datetime | None


class ScheduleListItem(ScheduleSummary):
    """A schedule as lists show it."""

    last_tick: TickDocument | None


class ScheduleList(_Document):
    """One page of schedules, newest first."""

    schedules: list[ScheduleListItem]
    next: str | None = Field(description="Give it as `before` to read the next page; null on the last one.")


class ScheduleDocument(ScheduleSummary):
    """A schedule whole."""

    ticks: list[TickDocument] = Field(description="The last twenty, newest first.")


class RecipeDocument(_Document):
    """How weights and activations may be quantized."""

    name: str
    description: str
    is_lossy: bool
    needs_calibration: bool = Field(description="Whether the float graph is run on text before it is quantized.")
    block_sizes: list[int] = Field(description="Rows of all matrices must be multiples of these.")
    constraint: str = Field(description="What the checkpoint or the request must bring; empty where it is nothing.")
    engines: list[str]
    formats: list[str]
    settings: list[dict[str, Any]] = Field(description="What ai-edge-quantizer is asked for.")


class Catalogue(_Document):
    """What a job may ask for."""

    recipes: list[RecipeDocument]
    formats: list[str]
    engines: list[str]
    devices: list[str]
    gates: list[str]


class Health(_Document):
    """The process lives."""

    status: Literal["ok"]


class Check(_Document):
    """One precondition of doing work."""

    ok: bool
    message: str | None = Field(default=None, description="What is wrong or right; only for known callers.")


class Readiness(_Document):
    """Whether jobs can be taken and done."""

    ready: bool
    checks: dict[str, Check]


class SlotsDocument(_Document):
    """Slots of one resource class."""

    busy: int
    total: int


class RunningStep(_Document):
    """A step that a worker holds."""

    step_id: str
    kind: str
    tenant: str
    predicted_peak_anon_bytes: int | None
    started_at: datetime


class WorkerDocument(_Document):
    """A worker process and its host."""

    id: str
    host: str
    state: Literal["live", "draining", "silent"]
    cores: int
    memory_bytes: int = Field(description="The host's.")
    memory_predicted_bytes: int = Field(description="What all steps that run on the host are predicted to use.")
    memory_limit_bytes: int | None = Field(description="What one step of this worker may use.")
    disk_bytes: int | None = Field(description="Of the file system with its work folder.")
    disk_free_bytes: int | None
    slots: dict[str, SlotsDocument] = Field(description="Resource class -> slots.")
    toolchain_id: str
    toolchain: dict[str, str] = Field(description="Package -> version.")
    isolation: str | None = Field(description="`strong` or `weak`.")
    started_at: datetime
    heartbeat_age_s: float
    draining_at: datetime | None
    running: list[RunningStep]


class WorkerList(_Document):
    """The fleet."""

    workers: list[WorkerDocument]


class KeyDocument(_Document):
    """An API key, without its secret."""

    id: str
    name: str
    prefix: str = Field(description="How the key begins.", examples=["ek_1f0c9a2b"])
    scopes: list[str] = Field(description="`read`, `write`, `operate`.")
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None = Field(description="To the minute.")
    revoked_at: datetime | None
    replaced_by: str | None = Field(description="The key that a rotation has put in its place.")


class NewKeyDocument(KeyDocument):
    """A key that was just made."""

    key: str = Field(description="The key itself; it is never shown again.")


class KeyList(_Document):
    """The keys of a tenant."""

    keys: list[KeyDocument]


class TokenDocument(_Document):
    """A token for a kind of source, without the token."""

    kind: str = Field(examples=["hub"])
    fingerprint: str = Field(description="The beginning of its SHA-256.", examples=["sha256:9f86d081884c"])
    created_at: datetime


class TokenList(_Document):
    """The tokens of a tenant."""

    tokens: list[TokenDocument]


class DeviceDocument(_Document):
    """A phone or a host: what it is, and how it is."""

    id: str
    kind: Literal["phone", "virtual", "host", "unknown"] = Field(
        description="`virtual`: it says of itself that it is no phone; `unknown`: it has never answered."
    )
    state: Literal["ready", "busy", "absent", "offline", "unauthorized", "quarantined"]
    reason: str | None = Field(description="Why it is not ready; in full for operators.")
    tags: list[str]
    manufacturer: str | None
    model: str | None
    soc: str | None
    android: int | None
    os: str | None = Field(examples=["Android 15"])
    abi: str | None
    cores: int | None
    ram_gib: float | None = Field(description="As sold; `memory_bytes` is what the kernel has of it.")
    connections: list[str] = Field(description="adb's serial numbers for it; for operators.")
    host: str | None = Field(description="Of the worker that follows it; for operators.")
    seen_at: datetime


class DeviceList(_Document):
    """The devices."""

    devices: list[DeviceDocument]


class ToolDocument(_Document):
    """A version of a tool for one kind of machine code."""

    name: str
    version: str
    abi: str
    files: dict[str, str] = Field(description="File name -> SHA-256.")
    created_at: datetime


class ToolList(_Document):
    """The tools."""

    tools: list[ToolDocument]


class NewTool(ToolList):
    """The tools, and what a new one has brought about."""

    rebenchmarks: dict[str, int] | None = Field(
        description="How many benchmarks were `started`, `known` already, `away` with their phones, or `refused` by a "
        "tenant's quota; null where none was asked for."
    )


class MeasurementDocument(_Document):
    """One measurement of an artifact; its figures as in the job."""

    name: str = Field(description="A file name that tells it from others.")
    sha256: str
    size_bytes: int
    url: str = Field(description="Where the whole document is: every sample, the conditions, the raw logs.")
    measured_at: datetime
    device: dict[str, Any]
    verdict: str = Field(description="`stable`, `noisy`, `hot`, `short` or `dead`.")


class MeasurementList(_Document):
    """What was measured of an artifact."""

    measurements: list[MeasurementDocument]


class HistoryEntry(_Document):
    """A measurement in a tenant's history, without its samples."""

    id: str = Field(description="Of the step that measured; `/v1/measurements/difference` takes it.")
    job_id: str
    model: str = Field(description="The source, without its revision.")
    variant: str
    format: str | None
    device_id: str = Field(description="A phone's serial number, or what a host is.")
    device_kind: str | None = Field(description="`phone`, `virtual` or `host`; never mixed.")
    device_name: str | None
    tool: dict[str, Any] | None = Field(description="What measured, with its version.")
    backend: str | None
    ran_on: str | None = Field(description="Where it really ran, if elsewhere.")
    threads: int | None
    prefill_tokens: int | None
    decode_tokens: int | None
    verdict: str | None
    measured_at: datetime
    metrics: dict[str, dict[str, Any]] = Field(description="Metric -> `median` and the `interval` that holds it.")
    memory: dict[str, int] = Field(description="Peaks in bytes.")


class HistoryDocument(_Document):
    """Measurements over time, oldest first."""

    measurements: list[HistoryEntry]


class ChangeDocument(_Document):
    """What became of one metric."""

    metric: str
    baseline: float
    candidate: float
    ratio: float = Field(description="Candidate over baseline, of geometric means.")
    interval: list[float] | None = Field(description="Bounds that hold the true ratio with 95 % certainty.")
    verdict: Literal["faster", "slower", "no difference", "unclear", "larger", "smaller"]


class DifferenceDocument(_Document):
    """Two measurements held against each other."""

    baseline: HistoryEntry
    candidate: HistoryEntry
    differs: list[str] = Field(description="What they differ in: model, variant, device, tool, backend, threads, date.")
    is_paired: bool = Field(description="Their processes ran in turns, and are compared round by round.")
    changes: list[ChangeDocument]


class RangeDocument(_Document):
    """A predicted figure."""

    estimate: int
    low: int
    high: int


class DeviceFit(_Document):
    """What an artifact will take on one phone."""

    id: str
    kind: Literal["phone", "virtual"]
    name: str
    state: str
    memory_bytes: int | None
    memory_available_bytes: int | None = Field(description="What it had to give when it was last measured on.")
    memory_available_at: datetime | None
    verdict: Literal["fits", "tight", "doubtful", "too_large", "unknown"]
    sentence: str = Field(description="Why, and what it was made of.")
    basis: Literal["device", "artifact", "model", "nothing"]
    count: int = Field(description="Measurements, or artifacts where a model was fitted.")
    predicted: dict[str, RangeDocument] = Field(description="Peak -> bytes; empty where nothing bears a prediction.")


class FitDocument(_Document):
    """What an artifact will take on phones."""

    artifact_id: str
    size_bytes: int
    backend: str
    devices: list[DeviceFit]


_PROBLEM_TEXTS = {
    401: "An API key is needed, or the one given is not valid.",
    403: "The folder, the origin or the key does not allow it.",
    404: "There is no such thing, or it is another tenant's.",
    409: "The thing's state forbids it.",
    412: "The protocol has another version.",
    413: "The body is too large.",
    415: "The body has another type.",
    416: "The range lies outside the artifact.",
    422: "The request cannot work as written.",
    429: "The tenant has as much as it may have, or asks too often (`Retry-After`).",
    503: "Not now; try again later.",
}


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI entries of the problem documents that a route may answer with."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": _PROBLEM_TEXTS[status], "content": content, "model": Problem}
        for status in sorted({401, 422, 429, *statuses})
    }


def answers(model: type[BaseModel], description: str, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI entry of a route's own answer."""
    return {status: {"model": model, "description": description}}
