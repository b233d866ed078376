"""Routes of uploads: store a file, list what was stored."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from service.api.context import Context, ContextOf, ReadTenant, WriteTenant
from service.api.intake import Spool, open_spool, upload_disk
from service.api.schemas import UploadDocument, UploadList, answers, problem_responses
from service.checkpoint_files import SourceFile, choose_needed
from service.errors import InvalidRequest
from service.ledger import quotas, uploads
from service.ledger.blobs import OutputFile, Reprieves
from service.requests import PLAIN, JobRequest, UploadSource
from service.storage import blob_key
from service.user_files import check_upload, require_size

router = APIRouter(prefix="/v1", tags=["uploads"])

_check_lock = threading.Lock()

_PAGE = 50
_MAX_PAGE = 200
_BODY = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}, "required": True}


@router.post(
    "/uploads",
    status_code=201,
    summary="Upload a file",
    response_model=None,
    openapi_extra={"requestBody": _BODY},
    responses={
        **answers(UploadDocument, "The file is stored; requests name it by `sha256`.", 201),
        **answers(UploadDocument, "The same bytes were there already.", 200),
        **problem_responses(413, 429, 503),
    },
)
async def store_upload(
    request: Request,
    context: ContextOf,
    tenant_id: WriteTenant,
    name: Annotated[
        str | None, Query(max_length=200, pattern=PLAIN, description="What you call it; for people.")
    ] = None,
) -> Response:
    """Store the request's body as it is: calibration text, prompts, an evaluation, a text for perplexity."""
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        raise InvalidRequest("Send the file's bytes as the body (`curl --data-binary @FILE`), not as a form.")
    await anyio.to_thread.run_sync(quotas.require_room_for_upload, context.database, tenant_id)
    with open_spool(context) as spool:
        try:
            async for chunk in request.stream():
                await anyio.to_thread.run_sync(spool.write, chunk)
        except ClientDisconnect:
            return Response(status_code=400)
        if spool.size_bytes == 0:
            raise InvalidRequest("The upload is empty; send the file's bytes as the body.")
        document, is_new = await anyio.to_thread.run_sync(_keep, context, tenant_id, spool, name)
    return JSONResponse(document, status_code=201 if is_new else 200)


def _keep(context: Context, tenant_id: str, spool: Spool, name: str | None) -> tuple[dict[str, object], bool]:
    """Store and enter an upload; return it, and whether it is new to its tenant."""

    def commit(file: OutputFile, reprieves: Reprieves) -> bool:
        return uploads.enter_upload(context.database, tenant_id, file, name, reprieves)

    is_new = spool.keep(context, commit)
    return uploads.read_upload(context.database, tenant_id, spool.digest), is_new


def check_uploads(context: Context, tenant_id: str, request: JobRequest) -> None:
    """Read what a request's uploads hold as the steps will, hours later; of a checkpoint's files, the listing alone.

    Raises `UploadNotFound` before anything is read, `CalibrationInvalid`, `EvaluationInvalid` and `CheckpointInvalid`.
    """
    if not request.held_uploads:
        return
    sizes = uploads.read_sizes(context.database, tenant_id, request.held_uploads)
    if isinstance(request.source, UploadSource):
        files = request.source.files.items()
        choose_needed((SourceFile(name, sizes[digest]) for name, digest in files), "The upload")
    if not request.uploads:
        return
    # One at a time: what strangers wrote is parsed here, however many submit it.
    with _check_lock, upload_disk(context) as root, tempfile.TemporaryDirectory(dir=root) as folder:
        for purpose, digest in request.uploads.items():
            kind = request.calibration.kind if request.calibration and purpose == "calibration" else None
            path = Path(folder) / purpose
            require_size(purpose, sizes[digest], kind)
            context.store.get_file(blob_key(digest), path, digest)
            check_upload(purpose, path, kind)


@router.get(
    "/uploads",
    summary="List uploads",
    response_model=None,
    responses={**answers(UploadList, "One page, newest first."), **problem_responses(404)},
)
def list_uploads(
    context: ContextOf,
    tenant_id: ReadTenant,
    limit: Annotated[int, Query(ge=1, le=_MAX_PAGE, description="Uploads a page.")] = _PAGE,
    before: Annotated[str | None, Query(max_length=64, description="`next` of the page before.")] = None,
) -> JSONResponse:
    """Return one page of the tenant's uploads."""
    page = uploads.list_uploads(context.database, tenant_id, limit=limit + 1, before=before)
    shown = page[:limit]
    return JSONResponse({"uploads": shown, "next": shown[-1]["sha256"] if len(page) > limit else None})
