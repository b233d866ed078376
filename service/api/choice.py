"""Routes of choice: how a job's artifacts compare, and which one to take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, create_model

from service import choice
from service.api.context import ContextOf, ReadTenant
from service.api.jobs import JobId
from service.api.schemas import ComparisonDocument, PickDocument, answers, problem_responses
from service.comparison import AXES, describe_comparison
from service.gates import GATES
from service.ledger.candidates import read_candidates

router = APIRouter(prefix="/v1", tags=["jobs"])


class _Wish(BaseModel):
    """The query of a pick; every gate is a parameter too."""

    model_config = ConfigDict(extra="forbid")
    prefer: str = Field(default=choice.DEFAULT_PREFERENCE, description=f"One of {', '.join(AXES)}.")
    format: str | None = Field(default=None, description="By default litertlm, else task, else tflite.")
    engine: str | None = Field(default=None, description="Only artifacts of this engine.")


def _describe(name: str) -> str:
    gate = GATES[name]
    return f"`{gate.figure_name}` must be {gate.bound.replace('_', ' ')} this."


if TYPE_CHECKING:
    _Query = _Wish
else:
    _fields: dict[str, Any] = {
        name: (FiniteFloat | None, Field(default=None, description=_describe(name))) for name in GATES
    }
    _Query = create_model("_Query", __base__=_Wish, **_fields)


@router.get(
    "/jobs/{job_id}/comparison",
    summary="Compare a job's artifacts",
    response_model=None,
    responses={**answers(ComparisonDocument, "All artifacts with their figures."), **problem_responses(404)},
)
def compare_artifacts(context: ContextOf, tenant_id: ReadTenant, job_id: JobId) -> JSONResponse:
    """Return, for each format, which artifacts no other beats in size, quality, speed and memory at once."""
    job, candidates = read_candidates(context.database, tenant_id, job_id)
    return JSONResponse(describe_comparison(job, candidates))


@router.get(
    "/jobs/{job_id}/pick",
    summary="Pick an artifact of a job",
    response_model=None,
    responses={
        **answers(PickDocument, "The best that fits and why; `picked` is null when none fits."),
        **problem_responses(404),
    },
)
def pick_artifact(
    context: ContextOf, tenant_id: ReadTenant, job_id: JobId, query: Annotated[_Query, Query()]
) -> JSONResponse:
    """Return the best published artifact within bounds, what excludes the others, or the nearest miss."""
    asked = query.model_dump(exclude_none=True)
    bounds = {name: asked[name] for name in GATES if name in asked}
    wish = choice.Wish(bounds, query.prefer, query.format, query.engine)
    job, candidates = read_candidates(context.database, tenant_id, job_id)
    return JSONResponse(choice.describe_pick(job, candidates, wish))
