"""Routes of measurements over time: their history, and what two of them say of each other."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse

from service.api.context import ContextOf, ReadTenant
from service.api.schemas import DifferenceDocument, HistoryDocument, answers, problem_responses
from service.difference import describe_difference
from service.ledger import history

router = APIRouter(prefix="/v1", tags=["measurements"])

MeasurementId = Annotated[str, Query(description="As the history names it.", max_length=64)]
_Text = Annotated[str | None, Query(max_length=1000)]


@router.get(
    "/measurements",
    summary="List measurements over time",
    response_model=None,
    responses={**answers(HistoryDocument, "The newest that fit, oldest first."), **problem_responses()},
)
def list_history(
    context: ContextOf,
    tenant_id: ReadTenant,
    model: _Text = None,
    variant: _Text = None,
    format: _Text = None,
    device: _Text = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> JSONResponse:
    """Return the tenant's measurements of all jobs: `model` as its source or the last part of that, `device` by id."""
    wanted = history.Filter(model, variant, format, device)
    return JSONResponse({"measurements": history.list_history(context.database, tenant_id, wanted, limit)})


@router.get(
    "/measurements/difference",
    summary="Compare two measurements",
    response_model=None,
    responses={
        **answers(DifferenceDocument, "What became of each metric, with the interval of the ratio."),
        **problem_responses(404),
    },
)
def find_difference(
    context: ContextOf, tenant_id: ReadTenant, baseline: MeasurementId, candidate: MeasurementId
) -> JSONResponse:
    """Say whether the candidate is faster or slower than the baseline, as far as their samples bear it."""
    pair = [history.read_measurement(context.database, tenant_id, each) for each in (baseline, candidate)]
    return JSONResponse(describe_difference(*pair))
