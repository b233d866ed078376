"""Routes of uploads: store a file, list what was stored."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from functools import partial
from pathlib import Path
from typing import IO, Annotated

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from service.api.context import Context, ContextOf, TenantOf
from service.api.schemas import UploadDocument, UploadList, answers, problem_responses
from service.errors import InvalidRequest
from service.ledger import quotas, uploads
from service.ledger.blobs import OutputFile, commit_uploaded
from service.requests import JobRequest
from service.storage import blob_key
from service.storage.disk import disk_errors
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
    tenant_id: TenantOf,
    name: Annotated[str | None, Query(max_length=200, description="What you call the file; for people.")] = None,
) -> Response:
    """Store the request's body as it is: calibration text, prompts, an evaluation, a text for perplexity."""
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        raise InvalidRequest("Send the file's bytes as the body (`curl --data-binary @FILE`), not as a form.")
    await anyio.to_thread.run_sync(quotas.require_room_for_upload, context.database, tenant_id)
    folder = context.settings.cache_dir / "uploads"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # It has no name, so that nothing is left of it whatever happens.
    with disk_errors(folder), tempfile.TemporaryFile(dir=folder) as stream:
        try:
            file = await _receive(request, stream)
        except ClientDisconnect:
            return Response(status_code=400)
        document, is_new = await anyio.to_thread.run_sync(partial(_keep, context, tenant_id, stream, file, name))
    return JSONResponse(document, status_code=201 if is_new else 200)


async def _receive(request: Request, stream: IO[bytes]) -> OutputFile:
    digest = hashlib.sha256()
    size_bytes = 0
    async for chunk in request.stream():
        digest.update(chunk)
        size_bytes += len(chunk)
        await anyio.to_thread.run_sync(stream.write, chunk)
    if size_bytes == 0:
        raise InvalidRequest("The upload is empty; send the file's bytes as the body.")
    stream.flush()
    return OutputFile("upload", digest.hexdigest(), size_bytes)


def _keep(
    context: Context, tenant_id: str, stream: IO[bytes], file: OutputFile, name: str | None
) -> tuple[dict[str, object], bool]:
    """Put the bytes into the store, then the row into the ledger; return the upload and whether it is new."""

    def store(_digests: object = None) -> None:
        context.store.put_file(blob_key(file.digest), Path(f"/proc/self/fd/{stream.fileno()}"), file.digest)

    store()
    is_new = commit_uploaded(
        context.database,
        lambda reprieves: uploads.enter_upload(context.database, tenant_id, file, name, reprieves),
        store,
    )
    return uploads.read_upload(context.database, tenant_id, file.digest), is_new


def check_uploads(context: Context, tenant_id: str, request: JobRequest) -> None:
    """Read what a request's uploads hold as the steps will, hours later.

    Raises `UploadNotFound` before anything is read, `CalibrationInvalid` and `EvaluationInvalid`.
    """
    if not request.uploads:
        return
    uploads.require_uploads(context.database, tenant_id, request.uploads.values())
    root = context.settings.cache_dir / "uploads"
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    # One at a time: what strangers wrote is parsed here, however many submit it.
    with _check_lock, disk_errors(root), tempfile.TemporaryDirectory(dir=root) as folder:
        for purpose, digest in request.uploads.items():
            kind = request.calibration.kind if request.calibration and purpose == "calibration" else None
            path = Path(folder) / purpose
            require_size(purpose, uploads.read_upload(context.database, tenant_id, digest)["size_bytes"], kind)
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
    tenant_id: TenantOf,
    limit: Annotated[int, Query(ge=1, le=_MAX_PAGE, description="Uploads a page.")] = _PAGE,
    before: Annotated[str | None, Query(max_length=64, description="`next` of the page before.")] = None,
) -> JSONResponse:
    """Return one page of the tenant's uploads."""
    page = uploads.list_uploads(context.database, tenant_id, limit=limit + 1, before=before)
    shown = page[:limit]
    return JSONResponse({"uploads": shown, "next": shown[-1]["sha256"] if len(page) > limit else None})
