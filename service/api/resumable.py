"""Routes of resumable uploads: the tus protocol, version 1.0.0, with creation, expiration and termination.

A file is announced with its size, which must find room; its bytes come in any number of requests, each at the offset
that has been reached. What has arrived is in the store and in the ledger: it survives this process, and any replica
goes on with it. `docs/decisions/0021-resumable-uploads.md` says why.
"""

from __future__ import annotations

import base64
import binascii
from datetime import datetime
from email.utils import format_datetime
from functools import partial
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from service.api.assembly import Assembler
from service.api.context import Context, ContextOf, ReadTenant, WriteTenant
from service.api.intake import Spool, open_spool
from service.api.problems import make_problem_response
from service.api.schemas import ResumableDocument, ResumableList, answers, problem_responses
from service.errors import InvalidRequest, PayloadTooLarge
from service.ledger import resumable
from service.ledger.blobs import OutputFile, Reprieves
from service.ledger.resumable import MAX_PARTS, Announcement
from service.storage import check_digest

_VERSION = "1.0.0"
_TUS = {"Tus-Resumable": _VERSION, "Cache-Control": "no-store"}
_CONTENT_TYPE = "application/offset+octet-stream"
#: What is stored at once of a body. Larger files come in larger parts: half of those that one may have are left for
#: connections that break.
_PART_BYTES = 16 << 20
_MAX_NAME = 200
_BODY = {"content": {_CONTENT_TYPE: {"schema": {"type": "string", "format": "binary"}}}, "required": True}

router = APIRouter(prefix="/v1/uploads/resumable", tags=["uploads"])


def get_assembler(request: Request) -> Assembler:
    """Return the app's threads."""
    assembler: Assembler = request.app.state.assembler
    return assembler


AssemblerOf = Annotated[Assembler, Depends(get_assembler)]
Tus = Annotated[str | None, Header(alias="Tus-Resumable", description=f"`{_VERSION}`")]


@router.post(
    "",
    status_code=201,
    summary="Begin a resumable upload",
    response_model=None,
    responses={201: {"description": "`Location` takes the bytes."}, **problem_responses(412, 413, 422, 429)},
)
def begin_resumable(
    context: ContextOf,
    tenant_id: WriteTenant,
    tus: Tus = None,
    length: Annotated[int | None, Header(alias="Upload-Length", ge=1, description="Size in bytes.")] = None,
    metadata: Annotated[
        str,
        Header(alias="Upload-Metadata", description="`filename` for people, `sha256` to be checked; values in Base64."),
    ] = "",
) -> Response:
    """Announce a file: its size, and if you like its name and SHA-256 (hex)."""
    if tus != _VERSION:
        return _refuse_version(tus)
    if length is None:
        raise InvalidRequest("Upload-Length must say how many bytes the file has; an empty file cannot be uploaded.")
    if length > context.settings.max_resumable_bytes:
        raise PayloadTooLarge(
            f"The file has {length} bytes; at most {context.settings.max_resumable_bytes} are taken.",
            limit_bytes=context.settings.max_resumable_bytes,
        )
    announced = _read_announcement(length, metadata)
    upload_id = resumable.begin_upload(
        context.database, tenant_id, announced, context.settings.keep_unfinished_uploads_s
    )
    document = resumable.read_resumable(context.database, tenant_id, upload_id)
    return Response(status_code=201, headers={"Location": f"{router.prefix}/{upload_id}", **_describe(document)})


@router.get(
    "",
    summary="List unfinished uploads",
    response_model=None,
    responses=answers(ResumableList, "All of them, newest first."),
)
def list_resumable(context: ContextOf, tenant_id: ReadTenant) -> JSONResponse:
    """Return the uploads that are not stored yet: to go on with them, or to delete them."""
    return JSONResponse({"uploads": resumable.list_resumable(context.database, tenant_id)})


@router.get(
    "/{upload_id}",
    summary="Read a resumable upload",
    response_model=None,
    responses={**answers(ResumableDocument, "Its state; `upload` once it is stored."), **problem_responses(404)},
)
def get_resumable(context: ContextOf, tenant_id: ReadTenant, assembler: AssemblerOf, upload_id: str) -> JSONResponse:
    """Return how far an upload is. One whose bytes are all there is put together; ask until it is `stored`."""
    document = resumable.read_resumable(context.database, tenant_id, upload_id)
    _assemble(assembler, tenant_id, document)
    return JSONResponse(document)


@router.head(
    "/{upload_id}",
    summary="Ask where an upload goes on",
    response_model=None,
    responses={200: {"description": "`Upload-Offset` and `Upload-Length`."}, **problem_responses(404, 412)},
)
def head_resumable(context: ContextOf, tenant_id: ReadTenant, upload_id: str, tus: Tus = None) -> Response:
    """Answer with what has arrived and how much there will be."""
    document = resumable.read_resumable(context.database, tenant_id, upload_id)
    if tus != _VERSION:
        return _refuse_version(tus)
    return Response(headers={"Upload-Length": str(document["size_bytes"]), **_describe(document)})


@router.patch(
    "/{upload_id}",
    status_code=204,
    summary="Send the next bytes of an upload",
    response_model=None,
    openapi_extra={"requestBody": _BODY},
    responses={
        204: {"description": "`Upload-Offset` says what has arrived in all."},
        **problem_responses(404, 409, 412, 413, 415, 503),
    },
)
async def append_resumable(
    request: Request,
    context: ContextOf,
    tenant_id: WriteTenant,
    assembler: AssemblerOf,
    upload_id: str,
    offset: Annotated[int | None, Header(alias="Upload-Offset", ge=0, description="Where the body begins.")] = None,
    tus: Tus = None,
) -> Response:
    """Append the body. However the request ends, what came of it stays; `HEAD` says how much that is."""
    read = partial(resumable.read_resumable, context.database, tenant_id, upload_id)
    document = await anyio.to_thread.run_sync(read)
    if tus != _VERSION:
        return _refuse_version(tus)
    if request.headers.get("content-type") != _CONTENT_TYPE:
        return make_problem_response(InvalidRequest(f"Send the bytes as `Content-Type: {_CONTENT_TYPE}`."), 415, _TUS)
    if offset is None:
        raise InvalidRequest("Upload-Offset must say where the body begins.")
    if offset != document["offset_bytes"]:
        raise resumable.refuse_part(document["offset_bytes"])
    size_bytes = document["size_bytes"]
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and offset + int(declared) > size_bytes:
        raise _too_large(size_bytes)
    await _receive(request, _Receiver(context, tenant_id, upload_id, offset, size_bytes))
    document = await anyio.to_thread.run_sync(read)
    await anyio.to_thread.run_sync(_assemble, assembler, tenant_id, document)
    return Response(status_code=204, headers=_describe(document))


@router.delete(
    "/{upload_id}",
    status_code=204,
    summary="Give an upload up",
    response_model=None,
    responses={204: {"description": "It is forgotten."}, **problem_responses(404)},
)
def remove_resumable(context: ContextOf, tenant_id: WriteTenant, upload_id: str) -> Response:
    """Forget an upload with what came of it; a file that is stored already stays."""
    resumable.remove_resumable(context.database, tenant_id, upload_id)
    return Response(status_code=204, headers=_TUS)


class _Receiver:
    """Where one request has got to."""

    def __init__(self, context: Context, tenant_id: str, upload_id: str, offset: int, size_bytes: int) -> None:
        self.context = context
        self.offset = offset
        self.size_bytes = size_bytes
        self.part_bytes = max(_PART_BYTES, -(-size_bytes * 2 // MAX_PARTS))
        self._tenant_id = tenant_id
        self._upload_id = upload_id

    def keep(self, spool: Spool) -> None:
        """Store a part and enter it; raises `Conflict` when another request was there first."""

        def commit(file: OutputFile, reprieves: Reprieves) -> None:
            resumable.add_part(
                self.context.database,
                self._tenant_id,
                self._upload_id,
                self.offset,
                file,
                self.context.settings.keep_unfinished_uploads_s,
                reprieves,
            )

        if spool.size_bytes:
            spool.keep(self.context, commit)
            self.offset += spool.size_bytes


async def _receive(request: Request, receiver: _Receiver) -> None:
    """Store a body part by part; what had arrived when its sender vanished is stored too."""
    body = request.stream()
    rest = b""
    is_open = True
    while is_open:
        with open_spool(receiver.context) as spool:
            while spool.size_bytes < receiver.part_bytes:
                try:
                    rest = rest or await anext(body)
                except (StopAsyncIteration, ClientDisconnect):
                    is_open = False
                    break
                if receiver.offset + spool.size_bytes + len(rest) > receiver.size_bytes:
                    raise _too_large(receiver.size_bytes)
                room_bytes = receiver.part_bytes - spool.size_bytes
                piece, rest = rest[:room_bytes], rest[room_bytes:]
                await anyio.to_thread.run_sync(spool.write, piece)
            await anyio.to_thread.run_sync(receiver.keep, spool)


def _assemble(assembler: Assembler, tenant_id: str, document: dict[str, Any]) -> None:
    if document["state"] == "assembling":
        assembler.begin(tenant_id, document["id"], document["size_bytes"], document["sha256"])


def _describe(document: dict[str, Any]) -> dict[str, str]:
    """Return the headers that tell of an upload."""
    expires_at = datetime.fromisoformat(document["expires_at"])
    return {
        **_TUS,
        "Upload-Offset": str(document["offset_bytes"]),
        "Upload-Expires": format_datetime(expires_at, usegmt=True),
    }


def _read_announcement(size_bytes: int, metadata: str) -> Announcement:
    """Read `Upload-Metadata`: pairs of a name and a value in Base64; names that mean nothing here are passed over."""
    values = {}
    for pair in filter(None, (each.strip() for each in metadata.split(","))):
        name, _, value = pair.partition(" ")
        try:
            values[name] = base64.b64decode(value.strip(), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            raise InvalidRequest(f"Upload-Metadata: the value of {name[:40]!r} is not UTF-8 in Base64.") from error
    digest = values.get("sha256")
    title = values.get("filename") or values.get("name")
    if title is not None and not title.isprintable():
        raise InvalidRequest("Upload-Metadata: the name holds characters that cannot be shown.")
    return Announcement(size_bytes, title[:_MAX_NAME] if title else None, check_digest(digest) if digest else None)


def _refuse_version(given: str | None) -> Response:
    error = InvalidRequest(f"This speaks tus {_VERSION}: send `Tus-Resumable: {_VERSION}`, not {given!r}.")
    return make_problem_response(error, 412, {**_TUS, "Tus-Version": _VERSION})


def _too_large(size_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The body goes beyond the {size_bytes} bytes that were announced.", limit_bytes=size_bytes)
