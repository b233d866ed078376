"""Routes of schedules: add, list, read, pause, resume, remove."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Query
from fastapi.responses import JSONResponse, Response

from service.api.context import ContextOf, ReadTenant, WriteTenant
from service.api.schemas import ScheduleDocument, ScheduleList, answers, problem_responses
from service.api.uploads import check_uploads
from service.ledger import schedules
from service.schedules import ScheduleRequest
from service.sources import admit_source

router = APIRouter(prefix="/v1", tags=["schedules"])

ScheduleId = Annotated[str, Path(description="A schedule's id.", examples=["sch_1f0c9a2b3c4d5e6f"], max_length=64)]
_PAGE = 50
_MAX_PAGE = 200

_EXAMPLES: dict[str, Any] = {
    "nightly": {
        "summary": "Every night at three, in Berlin",
        "value": {
            "name": "SmolLM, nightly",
            "cron": "0 3 * * *",
            "time_zone": "Europe/Berlin",
            "job": {"source": {"kind": "hub", "repo": "HuggingFaceTB/SmolLM-135M"}, "recipes": ["dynamic_int8"]},
        },
    },
    "interval": {
        "summary": "Every six hours",
        "value": {
            "name": "SmolLM",
            "every_s": 21600,
            "missed": "skip",
            "job": {"source": {"kind": "hub", "repo": "HuggingFaceTB/SmolLM-135M"}},
        },
    },
}


@router.post(
    "/schedules",
    status_code=201,
    summary="Add a schedule",
    response_model=None,
    responses={
        **answers(ScheduleDocument, "The schedule was made; `Location` names it.", 201),
        **problem_responses(403, 409, 413),
    },
)
def add_schedule(
    context: ContextOf, tenant_id: WriteTenant, request: Annotated[ScheduleRequest, Body(openapi_examples=_EXAMPLES)]
) -> JSONResponse:
    """Check the job as if it were submitted now, and store when it shall be; nothing is submitted before a tick."""
    admitted = request.model_copy(update={"job": admit_source(request.job, context.settings)})
    check_uploads(context, tenant_id, admitted.job)
    schedule_id = schedules.add_schedule(
        context.database, tenant_id, admitted, max_variants=context.settings.max_variants
    )
    return JSONResponse(
        schedules.read_schedule(context.database, tenant_id, schedule_id),
        status_code=201,
        headers={"Location": f"/v1/schedules/{schedule_id}"},
    )


@router.get(
    "/schedules",
    summary="List schedules",
    response_model=None,
    responses={**answers(ScheduleList, "One page, newest first."), **problem_responses(404)},
)
def list_schedules(
    context: ContextOf,
    tenant_id: ReadTenant,
    limit: Annotated[int, Query(ge=1, le=_MAX_PAGE, description="Schedules a page.")] = _PAGE,
    before: Annotated[str | None, Query(max_length=64, description="`next` of the page before.")] = None,
) -> JSONResponse:
    """Return one page of the tenant's schedules."""
    page = schedules.list_schedules(context.database, tenant_id, limit=limit + 1, before=before)
    shown = page[:limit]
    return JSONResponse({"schedules": shown, "next": shown[-1]["id"] if len(page) > limit else None})


@router.get(
    "/schedules/{schedule_id}",
    summary="Read a schedule",
    response_model=None,
    responses={**answers(ScheduleDocument, "The schedule with its ticks."), **problem_responses(404)},
)
def read_schedule(context: ContextOf, tenant_id: ReadTenant, schedule_id: ScheduleId) -> JSONResponse:
    """Return the next ticks, and what became of the last ones."""
    return JSONResponse(schedules.read_schedule(context.database, tenant_id, schedule_id))


@router.post(
    "/schedules/{schedule_id}/pause",
    summary="Pause a schedule",
    response_model=None,
    responses={**answers(ScheduleDocument, "The schedule is paused (now, or before)."), **problem_responses(404)},
)
def pause_schedule(context: ContextOf, tenant_id: WriteTenant, schedule_id: ScheduleId) -> JSONResponse:
    """Submit nothing until it is resumed; its jobs go on."""
    schedules.pause_schedule(context.database, tenant_id, schedule_id)
    return JSONResponse(schedules.read_schedule(context.database, tenant_id, schedule_id))


@router.post(
    "/schedules/{schedule_id}/resume",
    summary="Resume a schedule",
    response_model=None,
    responses={**answers(ScheduleDocument, "The schedule is active."), **problem_responses(404)},
)
def resume_schedule(context: ContextOf, tenant_id: WriteTenant, schedule_id: ScheduleId) -> JSONResponse:
    """Go on with the next tick from now; those of the pause are not made up for."""
    schedules.resume_schedule(context.database, tenant_id, schedule_id)
    return JSONResponse(schedules.read_schedule(context.database, tenant_id, schedule_id))


@router.delete(
    "/schedules/{schedule_id}",
    status_code=204,
    summary="Remove a schedule",
    response_class=Response,
    responses={204: {"description": "The schedule is gone."}, **problem_responses(404)},
)
def remove_schedule(context: ContextOf, tenant_id: WriteTenant, schedule_id: ScheduleId) -> Response:
    """Forget the schedule and its ticks; its jobs stay."""
    schedules.remove_schedule(context.database, tenant_id, schedule_id)
    return Response(status_code=204)
