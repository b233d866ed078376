"""Routes of the fleet: who works, and on what; for operators alone."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import JSONResponse

from service.api.context import ContextOf, OperatorOf
from service.api.schemas import WorkerDocument, WorkerList, answers, problem_responses
from service.ledger import fleet, roster

router = APIRouter(prefix="/v1", tags=["fleet"])

WorkerId = Annotated[str, Path(description="A worker's id.", examples=["worker_1f0c9a2b3c4d5e6f"], max_length=64)]


@router.get(
    "/workers",
    summary="List workers",
    response_model=None,
    responses={**answers(WorkerList, "Workers that have not ended, by host."), **problem_responses(403)},
)
def list_workers(context: ContextOf, _operator: OperatorOf) -> JSONResponse:
    """Return the fleet: hosts, slots, memory, disk, tools, heartbeats, and what each worker is running."""
    return JSONResponse({"workers": roster.read_roster(context.database)})


@router.post(
    "/workers/{worker_id}/drain",
    summary="Drain a worker",
    response_model=None,
    responses={
        **answers(WorkerDocument, "It claims nothing more, and finishes what it runs."),
        **problem_responses(403, 404),
    },
)
def drain_worker(context: ContextOf, _operator: OperatorOf, worker_id: WorkerId) -> JSONResponse:
    """Let a worker claim nothing new; stop it once `running` is empty. Draining twice is draining once."""
    fleet.drain_worker(context.database, worker_id)
    return JSONResponse(roster.read_worker(context.database, worker_id))


@router.post(
    "/workers/{worker_id}/resume",
    summary="Let a drained worker claim again",
    response_model=None,
    responses={**answers(WorkerDocument, "It claims again."), **problem_responses(403, 404)},
)
def resume_worker(context: ContextOf, _operator: OperatorOf, worker_id: WorkerId) -> JSONResponse:
    """Take a drain back."""
    fleet.resume_worker(context.database, worker_id)
    return JSONResponse(roster.read_worker(context.database, worker_id))
