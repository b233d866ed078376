"""Routes of jobs: submit, list, read, cancel, retry, delete; and the catalogue of what they may ask for."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Path, Query
from fastapi.responses import JSONResponse, Response

from service import gates, tracing
from service.api.context import Context, ContextOf, ReadTenant, WriteTenant
from service.api.schemas import Catalogue, JobDocument, JobList, answers, problem_responses
from service.api.uploads import check_uploads
from service.ledger import jobs, views
from service.ledger.idempotency import Submission
from service.recipes import DEVICES, ENGINES, FORMATS, describe_recipes
from service.requests import JobRequest
from service.sources import admit_source

router = APIRouter(prefix="/v1", tags=["jobs"])

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=200,
        description="Any text of yours. A repeated submission with the same key and body returns the first job.",
    ),
]
JobId = Annotated[str, Path(description="A job's id.", examples=["job_1f0c9a2b3c4d5e6f"], max_length=64)]
_PAGE = 50
_MAX_PAGE = 200

_EXAMPLES: dict[str, Any] = {
    "hub": {
        "summary": "A repository, two recipes, two formats",
        "value": {
            "source": {"kind": "hub", "repo": "HuggingFaceTB/SmolLM-135M"},
            "recipes": ["none", "dynamic_int8"],
            "formats": ["tflite", "litertlm"],
        },
    },
    "https": {
        "summary": "A folder of a web server",
        "value": {"source": {"kind": "https", "url": "https://models.example.org/mine/"}, "recipes": ["dynamic_int8"]},
    },
    "s3": {
        "summary": "A prefix of a bucket that the operator allows",
        "value": {"source": {"kind": "s3", "bucket": "models", "prefix": "mine"}, "recipes": ["dynamic_int8"]},
    },
    "upload": {
        "summary": "Files that were uploaded before, by their digests",
        "value": {
            "source": {
                "kind": "upload",
                "name": "mine",
                "files": {
                    "config.json": "9f86d081" * 8,
                    "tokenizer.json": "2c26b46b" * 8,
                    "model.safetensors": "fcde2b2e" * 8,
                },
            },
        },
    },
    "folder": {
        "summary": "A folder below a source root, benchmarked on the host",
        "value": {
            "source": {"kind": "folder", "path": "/srv/checkpoints/addition"},
            "recipes": ["dynamic_int8"],
            "formats": ["litertlm"],
            "devices": ["host"],
        },
    },
}


@router.post(
    "/jobs",
    status_code=201,
    summary="Submit a job",
    response_model=None,
    responses={
        **answers(JobDocument, "The job was made; `Location` names it.", 201),
        **answers(JobDocument, "The same `Idempotency-Key` had made this job before.", 200),
        **problem_responses(403, 409, 413, 429),
    },
)
def submit_job(
    context: ContextOf,
    tenant_id: WriteTenant,
    request: Annotated[JobRequest, Body(openapi_examples=_EXAMPLES)],
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Check the whole request, then store the job; it is there when the answer arrives, and work begins at once."""
    admitted = admit_source(request, context.settings)
    check_uploads(context, tenant_id, admitted)
    submission = jobs.submit_job(
        context.database,
        tenant_id,
        admitted,
        max_variants=context.settings.max_variants,
        idempotency_key=idempotency_key,
        traceparent=tracing.current_traceparent() if tracing.is_on() else None,
    )
    return answer_submission(context, tenant_id, submission)


def answer_submission(context: Context, tenant_id: str, submission: Submission) -> JSONResponse:
    """Return the answer to a request that makes a job."""
    document = submission.document or views.read_job(context.database, tenant_id, submission.job_id)
    return JSONResponse(
        document,
        status_code=201 if submission.is_new else 200,
        headers={"Location": f"/v1/jobs/{submission.job_id}"},
    )


@router.get(
    "/jobs",
    summary="List jobs",
    response_model=None,
    responses={**answers(JobList, "One page, newest first."), **problem_responses(404)},
)
def list_jobs(
    context: ContextOf,
    tenant_id: ReadTenant,
    state: Annotated[list[str], Query(description="Only jobs in this state; may be repeated.")] = [],  # noqa: B006
    limit: Annotated[int, Query(ge=1, le=_MAX_PAGE, description="Jobs a page.")] = _PAGE,
    before: Annotated[str | None, Query(max_length=64, description="`next` of the page before.")] = None,
) -> JSONResponse:
    """Return one page of the tenant's jobs."""
    # One more than asked for tells whether there is a next page.
    page = views.list_jobs(context.database, tenant_id, states=state, limit=limit + 1, before=before)
    has_more = len(page) > limit
    shown = page[:limit]
    return JSONResponse({"jobs": shown, "next": shown[-1]["id"] if has_more else None})


@router.get(
    "/jobs/{job_id}",
    summary="Read a job",
    response_model=None,
    responses={**answers(JobDocument, "The job whole."), **problem_responses(404)},
)
def read_job(context: ContextOf, tenant_id: ReadTenant, job_id: JobId) -> JSONResponse:
    """Return request, pinned source, variants with artifacts and figures, and steps."""
    return JSONResponse(views.read_job(context.database, tenant_id, job_id))


@router.post(
    "/jobs/{job_id}/cancel",
    summary="Cancel a job",
    response_model=None,
    responses={**answers(JobDocument, "The job is cancelled (now, or before)."), **problem_responses(404, 409)},
)
def cancel_job(context: ContextOf, tenant_id: WriteTenant, job_id: JobId) -> JSONResponse:
    """End a job and every step that no other job needs; what was published stays."""
    jobs.cancel_job(context.database, tenant_id, job_id)
    return JSONResponse(views.read_job(context.database, tenant_id, job_id))


@router.post(
    "/jobs/{job_id}/retry",
    summary="Retry a job",
    response_model=None,
    responses={**answers(JobDocument, "The job is open again."), **problem_responses(404, 409, 429)},
)
def retry_job(context: ContextOf, tenant_id: WriteTenant, job_id: JobId) -> JSONResponse:
    """Open an ended job again for the variants that did not succeed; finished work is kept."""
    jobs.retry_job(context.database, tenant_id, job_id)
    return JSONResponse(views.read_job(context.database, tenant_id, job_id))


@router.delete(
    "/jobs/{job_id}",
    status_code=204,
    summary="Delete a job",
    response_class=Response,
    responses={204: {"description": "The job is gone."}, **problem_responses(404, 409)},
)
def delete_job(context: ContextOf, tenant_id: WriteTenant, job_id: JobId) -> Response:
    """Forget an ended job with its artifacts and logs; bytes that nobody else needs are freed later."""
    jobs.remove_job(context.database, tenant_id, job_id)
    return Response(status_code=204)


@router.get(
    "/recipes",
    summary="What a job may ask for",
    tags=["catalogue"],
    response_model=None,
    responses={**answers(Catalogue, "Recipes, formats, engines, devices and gates."), **problem_responses()},
)
def list_recipes(_tenant_id: ReadTenant) -> JSONResponse:
    """Return the names that a job request may use."""
    return JSONResponse(
        {
            "recipes": describe_recipes(),
            "formats": list(FORMATS),
            "engines": list(ENGINES),
            "devices": list(DEVICES),
            "gates": sorted(gates.NAMEABLE),
        }
    )
