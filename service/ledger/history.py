"""History: what a tenant's benchmarks have measured, over jobs and time. Reads only.

A series is one place in it: model, variant, format, device and how it was measured; revisions, tools and dates go by
within it. Called by `service.api.measurements`, and by the worker that is about to commit a benchmark.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, literal_column, select

from service import difference
from service.difference import MEMORY, find_metrics
from service.errors import NotFound
from service.ledger.claims import Claim
from service.ledger.database import Database, reads
from service.ledger.states import StepState
from service.ledger.tables import Job, JobStep, Step, Variant, VariantStep

Document = dict[str, Any]

#: What of a source names the model; its revision is what changes.
_MODEL_FIELD = {"folder": "path", "hub": "repo", "https": "url", "upload": "name"}
#: Entry -> what must be equal for two measurements to be of one series.
SERIES = (
    "model",
    "variant",
    "format",
    "device_kind",
    "device_id",
    "backend",
    "ran_on",
    "threads",
    "prefill_tokens",
    "decode_tokens",
)
#: How many of a tenant's latest benchmarks are looked through for a predecessor or a page.
_MOST_ROWS = 5000


@dataclass(frozen=True)
class Filter:
    """Which measurements are wanted; None: all. Text is compared whole."""

    model: str | None = None
    variant: str | None = None
    format: str | None = None
    #: As `device_id` of an entry.
    device: str | None = None

    def fits(self, entry: Mapping[str, Any]) -> bool:
        """Whether an entry is meant; a model also by the last part of its name."""
        return (
            (self.model is None or self.model in (entry["model"], entry["model"].rstrip("/").rpartition("/")[2]))
            and (self.variant is None or self.variant == entry["variant"])
            and (self.format is None or self.format == entry["format"])
            and (self.device is None or self.device == entry["device_id"])
        )


@reads
def list_history(connection: Connection, tenant_id: str, wanted: Filter, limit: int) -> list[Document]:
    """Return the newest measurements that fit, oldest first, without their samples."""
    found = []
    for entry in _iterate(connection, tenant_id):
        if wanted.fits(entry):
            found.append(entry)
        if len(found) == limit:
            break
    return [_leave_samples_out(entry) for entry in reversed(found)]


@reads
def read_measurement(connection: Connection, tenant_id: str, measurement_id: str) -> tuple[Document, Mapping[str, Any]]:
    """Return an entry of the history, and its figures with all samples; raises `NotFound`."""
    step_id = measurement_id.partition(".")[0]
    row = connection.execute(_statement(tenant_id).where(Step.id == step_id).limit(1)).one_or_none()
    figures = None if row is None else dict(_name_measured(row.id, row.figures)).get(measurement_id)
    if row is None or figures is None:
        raise NotFound(
            f"There is no measurement {measurement_id!r}. `edgekiln history` lists those there are.",
            measurement_id=measurement_id,
        )
    return _leave_samples_out(_describe(row, measurement_id, figures)), figures


@reads
def find_previous(
    connection: Connection, claim: Claim, figures: Mapping[str, Any]
) -> tuple[Document, Mapping[str, Any]] | None:
    """Return the newest stable measurement of the series that a benchmark's figures are about to enter, or None."""
    row = connection.execute(_select_places().where(Step.id == claim.step_id).limit(1)).one_or_none()
    if row is None:
        return None
    own = _describe(row, row.id, figures)
    for entry in _iterate(connection, claim.tenant_id):
        if entry["verdict"] == "stable" and all(entry[name] == own[name] for name in SERIES):
            return _leave_samples_out(entry), entry["figures"]
    return None


def find_regressions(
    database: Database, claim: Claim, figures: Mapping[str, Any], least_share: float
) -> list[Document]:
    """Return what a benchmark that is about to be committed found worse than the one before it.

    Before its transaction, because the comparison takes a second where scipy is not loaded yet.
    """
    found: list[Document] = []
    if claim.kind != "benchmark":
        return found
    for _, measured in _name_measured(claim.step_id, figures):
        if measured.get("verdict") == "stable" and (previous := find_previous(database, claim, measured)):
            found += difference.find_regressions(previous, measured, least_share)
    return found


def _select_places() -> Any:
    """Steps with the job that wanted them and its variant; a later benchmark serves the variant it measured too."""
    return (
        select(
            Step.id, Step.figures, Step.finalized_at, Variant.name.label("variant"), Job.id.label("job_id"), Job.request
        )
        .join(JobStep, JobStep.step_id == Step.id)
        .join(Job, Job.id == JobStep.job_id)
        .join(Variant, Variant.job_id == Job.id)
        .join(VariantStep, and_(VariantStep.variant_id == Variant.id, VariantStep.step_id == Step.id))
    )


def _statement(tenant_id: str) -> Any:
    return _select_places().where(
        # Written into the statement as in the index's condition, or it could not serve.
        Step.tenant_id == tenant_id,
        Step.kind == literal_column("'benchmark'"),
        Step.state == literal_column(f"'{StepState.SUCCEEDED}'"),
    )


def _iterate(connection: Connection, tenant_id: str) -> Iterator[Document]:
    """Yield a tenant's measurements with their figures, newest first."""
    statement = _statement(tenant_id).order_by(Step.finalized_at.desc(), Step.id.desc()).limit(_MOST_ROWS)
    for row in connection.execute(statement.execution_options(yield_per=50)):
        for name, figures in _name_measured(row.id, row.figures):
            if "device" in figures:
                yield _describe(row, name, figures)


def _name_measured(step_id: str, figures: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the measurements of a benchmark by their ids: the step's own, or `STEP.N` of its Nth arm."""
    if "arms" not in figures:
        return [(step_id, figures)]
    arms = enumerate(figures["arms"], 1)
    return [(f"{step_id}.{number}", arm) for number, arm in arms if "error" not in arm]


def _describe(row: Row[Any], measurement_id: str, figures: Mapping[str, Any]) -> Document:
    device = figures.get("device") or {}
    return {
        "id": measurement_id,
        "job_id": row.job_id,
        "model": name_model(row.request["source"]),
        "variant": row.variant,
        "format": figures.get("format"),
        "device_id": name_device(device),
        "device_kind": device.get("kind"),
        "device_name": device.get("name"),
        "tool": device.get("tool") or device.get("tools"),
        **{name: figures.get(name) for name in ("backend", "ran_on", "threads", "prefill_tokens", "decode_tokens")},
        "verdict": figures.get("verdict"),
        "measured_at": None if row.finalized_at is None else row.finalized_at.isoformat(),
        "metrics": {
            name: {key: summary.get(key) for key in ("median", "interval")}
            for name, (_, summary) in find_metrics(figures).items()
        },
        "memory": {name: figures[name] for name in MEMORY if figures.get(name)},
        "figures": figures,
    }


def _leave_samples_out(entry: Mapping[str, Any]) -> Document:
    return {name: value for name, value in entry.items() if name != "figures"}


def name_model(source: Mapping[str, Any]) -> str:
    """Return what stays the same of a model from revision to revision."""
    if source["kind"] == "s3":
        return f"s3://{source['bucket']}/{source.get('prefix') or ''}".rstrip("/")
    return str(source.get(_MODEL_FIELD.get(source["kind"], "name")) or "model")


def name_device(device: Mapping[str, Any]) -> str:
    """Return a phone's serial number; of a host, which has none, what it is."""
    if device.get("serial"):
        return str(device["serial"])
    cores = f"{device['usable_cores']} cores" if device.get("usable_cores") else None
    return ", ".join(str(part) for part in (device.get("name"), device.get("cpu_model"), cores) if part)
