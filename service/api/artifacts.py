"""Routes of artifacts: list, download with ranges, manifest, signature, measurements, benchmarks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Body, Header, Path, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from service import fit, tracing
from service.api.context import ContextOf, ReadTenant, WriteTenant
from service.api.jobs import IdempotencyKey, JobId, answer_submission
from service.api.ranges import matches, parse_range
from service.api.schemas import ArtifactList, FitDocument, JobDocument, MeasurementList, answers, problem_responses
from service.errors import NotFound
from service.ledger import benchmarks, measurements, peaks, views
from service.requests import BenchmarkRequest
from service.storage import blob_key, check_stream, read_object

router = APIRouter(prefix="/v1", tags=["artifacts"])

ArtifactId = Annotated[str, Path(description="An artifact's id.", examples=["art_1f0c9a2b3c4d5e6f"], max_length=64)]
_BENCHMARKS: dict[str, Any] = {
    "phones": {
        "summary": "On one phone of a kind, on its CPU and its GPU",
        "value": {"devices": ["soc=SM8650"], "backends": ["cpu", "gpu"]},
    }
}
_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


@router.get(
    "/jobs/{job_id}/artifacts",
    summary="List a job's artifacts",
    response_model=None,
    responses={**answers(ArtifactList, "What the job has published so far."), **problem_responses(404)},
)
def list_artifacts(context: ContextOf, tenant_id: ReadTenant, job_id: JobId) -> JSONResponse:
    """Return every published artifact with its variant's name."""
    return JSONResponse({"artifacts": views.list_artifacts(context.database, tenant_id, job_id)})


@router.api_route(
    "/artifacts/{artifact_id}",
    methods=["GET"],
    summary="Download an artifact",
    response_class=Response,
    responses={
        200: {"description": "The file. Its ETag is its SHA-256.", "content": _BYTES},
        206: {"description": "The part that `Range` asked for.", "content": _BYTES},
        304: {"description": "`If-None-Match` names this very file."},
        **problem_responses(404, 416, 503),
    },
)
@router.head("/artifacts/{artifact_id}", include_in_schema=False)
def download_artifact(
    request: Request,
    context: ContextOf,
    tenant_id: ReadTenant,
    artifact_id: ArtifactId,
    range_header: Annotated[str | None, Header(alias="Range", description="One range, e.g. `bytes=1000-`.")] = None,
    if_range: Annotated[str | None, Header(description="The range is good only for this ETag.")] = None,
    if_none_match: Annotated[str | None, Header(description="An ETag that the client holds.")] = None,
) -> Response:
    """Stream the file from the store.

    A whole download is checked against its digest on the way and cut off before its last bytes if it is damaged; of
    a part the client checks the digest when it has put the file together.
    """
    artifact = views.read_artifact(context.database, tenant_id, artifact_id)
    digest, size_bytes = artifact["sha256"], artifact["size_bytes"]
    etag = f'"{digest}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Content-Disposition": _disposition(artifact["name"]),
        "X-Content-Type-Options": "nosniff",
    }
    if matches(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    is_current = if_range is None or if_range.strip() == etag
    part = parse_range(range_header, size_bytes) if is_current else None
    headers["Content-Length"] = str(part.end - part.start if part else size_bytes)
    if part:
        headers["Content-Range"] = f"bytes {part.start}-{part.end - 1}/{size_bytes}"
    status = 206 if part else 200
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type="application/octet-stream")
    stack = ExitStack()
    # Opened before the answer begins: a missing blob is a problem document, not a broken download.
    key = blob_key(digest)
    chunks = stack.enter_context(context.store.open(key, *((part.start, part.end) if part else ())))
    checked = chunks if part else check_stream(chunks, artifact["name"], digest)
    return StreamingResponse(
        _stream(stack, checked), status_code=status, headers=headers, media_type="application/octet-stream"
    )


def _stream(stack: ExitStack, chunks: Iterator[bytes]) -> Iterator[bytes]:
    with stack:
        yield from chunks


@router.get(
    "/artifacts/{artifact_id}/manifest",
    summary="Read an artifact's manifest",
    response_class=Response,
    responses={
        200: {
            "description": "Provenance, proof and figures, byte for byte as published: their SHA-256 is the artifact's "
            "`manifest_sha256`.",
            "content": {"application/json": {"schema": {"type": "object"}}},
        },
        **problem_responses(404),
    },
)
def read_manifest(context: ContextOf, tenant_id: ReadTenant, artifact_id: ArtifactId) -> Response:
    """Return how the artifact came to be and what was proven of it."""
    artifact = views.read_artifact(context.database, tenant_id, artifact_id)
    return Response(
        artifact["manifest"].encode(),
        media_type="application/json",
        headers={"ETag": f'"{artifact["manifest_sha256"]}"', "X-Content-Type-Options": "nosniff"},
    )


@router.get(
    "/artifacts/{artifact_id}/signature",
    summary="Read an artifact's signature",
    response_class=Response,
    responses={
        200: {
            "description": "A Sigstore bundle over artifact and manifest, as `model-signing` reads it.",
            "content": {"application/json": {"schema": {"type": "object"}}},
        },
        **problem_responses(404),
    },
)
def read_signature(context: ContextOf, tenant_id: ReadTenant, artifact_id: ArtifactId) -> Response:
    """Return what the operator has signed artifact and manifest with."""
    signature = views.read_artifact(context.database, tenant_id, artifact_id)["signature"]
    if signature is None:
        raise NotFound(f"The artifact {artifact_id} was published without a signature.", artifact_id=artifact_id)
    return Response(signature, media_type="application/json", headers={"X-Content-Type-Options": "nosniff"})


@router.get(
    "/artifacts/{artifact_id}/measurements",
    summary="List an artifact's measurements",
    response_model=None,
    responses={**answers(MeasurementList, "What was measured of it so far."), **problem_responses(404)},
)
def list_measurements(context: ContextOf, tenant_id: ReadTenant, artifact_id: ArtifactId) -> JSONResponse:
    """Return the measurements of an artifact on every device; they are made after its manifest, and stand beside it."""
    found = measurements.list_measurements(context.database, tenant_id, artifact_id)
    return JSONResponse({"measurements": found})


@router.post(
    "/artifacts/{artifact_id}/benchmarks",
    status_code=201,
    summary="Benchmark an artifact",
    response_model=None,
    responses={
        **answers(JobDocument, "The job that measures it; `Location` names it.", 201),
        **answers(JobDocument, "The same `Idempotency-Key` had made this job before.", 200),
        **problem_responses(404, 409, 429),
    },
)
def benchmark_artifact(
    context: ContextOf,
    tenant_id: WriteTenant,
    artifact_id: ArtifactId,
    asked: Annotated[BenchmarkRequest, Body(openapi_examples=_BENCHMARKS)],
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Measure a published artifact, again or elsewhere, by a job of its own.

    What it finds stands beside the artifact (`/measurements`); manifest and first job stay as they are.
    """
    submission = benchmarks.submit_benchmark(
        context.database,
        tenant_id,
        artifact_id,
        asked,
        processes=context.settings.benchmark_processes,
        idempotency_key=idempotency_key,
        traceparent=tracing.current_traceparent() if tracing.is_on() else None,
    )
    return answer_submission(context, tenant_id, submission)


@router.get(
    "/artifacts/{artifact_id}/measurements/{digest}",
    summary="Read a measurement",
    response_class=Response,
    responses={
        200: {
            "description": "Every sample, the conditions, the commands and the raw logs.",
            "content": {"application/json": {"schema": {"type": "object"}}},
        },
        **problem_responses(404, 503),
    },
)
def read_measurement(
    context: ContextOf,
    tenant_id: ReadTenant,
    artifact_id: ArtifactId,
    digest: Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="The document's SHA-256.")],
) -> Response:
    """Return a measurement whole."""
    found = measurements.list_measurements(context.database, tenant_id, artifact_id)
    if digest not in [one["sha256"] for one in found]:
        raise NotFound(f"There is no measurement {digest} of the artifact {artifact_id!r}.", digest=digest)
    return Response(
        read_object(context.store, blob_key(digest), digest),
        media_type="application/json",
        headers={"ETag": f'"{digest}"', "X-Content-Type-Options": "nosniff"},
    )


@router.get(
    "/artifacts/{artifact_id}/fit",
    summary="Will an artifact fit?",
    response_model=None,
    responses={
        **answers(FitDocument, "What it will take on each phone, and whether it is there."),
        **problem_responses(404),
    },
)
def predict_fit(
    context: ContextOf,
    tenant_id: ReadTenant,
    artifact_id: ArtifactId,
    device: Annotated[
        str | None, Query(max_length=400, description="Which phones, as a job selects them; all without.")
    ] = None,
    backend: Annotated[Literal["cpu", "gpu", "npu"], Query(description="What it is to compute on.")] = "cpu",
) -> JSONResponse:
    """Return the artifact's predicted peak memory on phones, from the tenant's own measurements."""
    found = peaks.read_evidence(context.database, tenant_id, artifact_id, device)
    told = fit.predict_all(found.shape, found.devices, backend, found.peaks)
    shape = {"artifact_id": artifact_id, "size_bytes": found.shape.size_bytes, "backend": backend}
    return JSONResponse({**shape, "devices": told})


def _disposition(name: str) -> str:
    """Name the file for clients that read UTF-8 names and for those that do not."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
