"""Benchmarks that a new version of a tool brings about: what older versions have measured is measured with it too.

Finds what is outdated, and starts a benchmark for each (`service.ledger.benchmarks`), in the name of the tenant whose
artifact it is. Called by `service.api` for operators.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, select

from service.devices import PHONE_CLASS, list_arms
from service.errors import Conflict, EdgeKilnError, NotFound, QuotaExceeded
from service.ledger.benchmarks import submit_benchmark
from service.ledger.database import Database, reads
from service.ledger.keys import canonical_json, digest_json
from service.ledger.states import LIVE_STEP_STATES, DeviceState, StepState
from service.ledger.tables import Device, Job, Publication, Step, Tool, Variant, VariantStep
from service.requests import BenchmarkRequest

log = logging.getLogger(__name__)

#: After everything that tenants ask for themselves.
_PRIORITY = -100
#: What says nothing of which model a source is: it differs from version to version.
_VERSIONS = ("revision", "files")


@dataclass(frozen=True)
class _Way:
    """How an artifact was measured, or is to be."""

    device_id: str
    backend: str
    threads: int | None


@dataclass(frozen=True)
class _Outdated:
    """An artifact that no measurement by the new version knows in this way."""

    tenant_id: str
    artifact_id: str
    way: _Way
    smoke_prompts: int


@dataclass(frozen=True)
class Rebenchmarks:
    """What became of it."""

    started: int
    #: Measured with this version already, or about to be.
    known: int
    #: Their phones are not ready.
    away: int
    #: Their tenants' quotas are used up, or they cannot be measured any more.
    refused: int

    def to_json(self) -> dict[str, int]:
        """Return the wire form."""
        return dict(self.__dict__)


def start_rebenchmarks(database: Database, name: str, version: str, abi: str, *, processes: int) -> Rebenchmarks:
    """Start a benchmark wherever an older version of a tool has measured, on the same phone, backend and threads.

    Of each model, variant and format only the newest artifact that was measured in that way. The same again starts only
    what could not be started before; what has failed since is its tenant's to retry. Raises `Conflict` for a version
    that phones do not get because a newer one is registered.
    """
    outdated, known, away = _find_outdated(database, name, version, abi)
    started = refused = 0
    for one in outdated:
        request = BenchmarkRequest(
            devices=(f"serial={one.way.device_id}",),
            backends=(one.way.backend,),
            threads=() if one.way.threads is None else (one.way.threads,),
            smoke_prompts=one.smoke_prompts,
            priority=_PRIORITY,
        )
        asked = request.model_dump(mode="json", exclude_defaults=True)
        key = digest_json([name, version, abi, one.artifact_id, asked, processes])
        try:
            made = submit_benchmark(
                database, one.tenant_id, one.artifact_id, request, processes=processes, idempotency_key=f"tool {key}"
            )
        except QuotaExceeded:
            refused += 1
        except NotFound:
            # Deleted meanwhile.
            continue
        except EdgeKilnError as error:
            # One that this version cannot measure any more keeps no other from being measured.
            log.warning("%s of %s is not measured again: %s", one.artifact_id, one.tenant_id, error)
            refused += 1
        else:
            started += made.is_new
            known += not made.is_new
    return Rebenchmarks(started, known, away, refused)


@reads
def _find_outdated(connection: Connection, name: str, version: str, abi: str) -> tuple[list[_Outdated], int, int]:
    """Return what is to be measured, and how many ways are known already, and away."""
    is_it = Tool.name == name, Tool.abi == abi
    newest = connection.execute(
        select(Tool.__table__).where(*is_it).order_by(Tool.created_at.desc()).limit(1)
    ).one_or_none()
    if newest is None or newest.version != version:
        raise Conflict(
            f"Phones get {name} {newest.version if newest else '-'} for {abi}, not {version}: there is nothing to "
            "measure with it.",
            name=name,
            version=version,
            abi=abi,
        )
    of_each: dict[tuple[str, _Way], tuple[Any, bool, int]] = {}
    rows = connection.execution_options(yield_per=100).execute(_select_measured())
    for row, measured, asked in ((one, *arm) for one in rows for arm in list_arms(one.params, one.figures)):
        tool = measured["device"].get("tool") or {}
        # A variant's other formats have measurements of their own.
        if (tool.get("name"), tool.get("abi"), row.params["format"]) != (name, abi, row.kind):
            continue
        way = _way_of(measured["device"]["serial"], asked)
        place = (_name_model(row), way)
        artifact = (row.published_at, row.artifact_id)
        best = of_each.get(place)
        is_known = tool.get("version") == version
        if best is not None and best[0][:2] == artifact:
            is_known = is_known or best[1]
        elif best is not None and best[0][:2] > artifact:
            continue
        of_each[place] = ((*artifact, row.tenant_id), is_known, row.params.get("smoke_prompts") or 0)
    begun = _read_begun(connection, newest.created_at)
    ready = set(connection.execute(select(Device.id).where(Device.state == DeviceState.READY)).scalars())
    outdated = [
        _Outdated(tenant_id, artifact_id, way, smoke_prompts)
        for (_, way), ((_, artifact_id, tenant_id), is_known, smoke_prompts) in of_each.items()
        if not is_known and (artifact_id, way) not in begun
    ]
    present = [one for one in outdated if one.way.device_id in ready]
    return present, len(of_each) - len(outdated), len(outdated) - len(present)


def _select_measured() -> Any:
    return (
        select(
            Step.figures,
            Step.params,
            Publication.id.label("artifact_id"),
            Publication.tenant_id,
            Publication.kind,
            Publication.published_at,
            Variant.engine,
            Variant.recipe,
            Job.source,
        )
        .join(VariantStep, VariantStep.step_id == Step.id)
        .join(Publication, Publication.variant_id == VariantStep.variant_id)
        .join(Variant, Variant.id == Publication.variant_id)
        .join(Job, Job.id == Publication.job_id)
        .where(
            Step.kind == "benchmark",
            Step.resource_class == PHONE_CLASS,
            Step.state == StepState.SUCCEEDED,
            Publication.published_at.is_not(None),
        )
        # What the last measurement of a way was, decides how it is measured again.
        .order_by(Step.finalized_at, Step.id)
    )


def _way_of(device_id: str, params: Mapping[str, Any]) -> _Way:
    return _Way(device_id, params["backend"], params.get("threads"))


def _name_model(row: Any) -> str:
    """Return what the versions of one model's artifact have in common."""
    source = {name: value for name, value in (row.source or {}).items() if name not in _VERSIONS}
    return canonical_json([row.tenant_id, source, row.engine, row.recipe, row.kind]).decode()


def _read_begun(connection: Connection, since: Any) -> set[tuple[str, _Way]]:
    """Return the artifacts that are about to be measured on a phone that was named, by whichever version is newest."""
    will_get_it = and_(Step.state.in_(LIVE_STEP_STATES), (Step.state != StepState.RUNNING) | (Step.created_at >= since))
    rows = connection.execute(
        select(Publication.id, Publication.kind, Step.params)
        .join(VariantStep, VariantStep.variant_id == Publication.variant_id)
        .join(Step, Step.id == VariantStep.step_id)
        .where(Step.kind == "benchmark", Step.resource_class == PHONE_CLASS, will_get_it)
    )
    return {
        (row.id, _way_of(row.params["device"].removeprefix("serial="), asked))
        for row in rows
        if row.params["format"] == row.kind
        for asked in row.params.get("arms") or (row.params,)
    }
