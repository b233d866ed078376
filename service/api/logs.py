"""What the attempts of a job's steps wrote: the ends as JSON, or everything as text; of those that run, the end."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from service.api.context import ContextOf, ReadTenant
from service.api.jobs import JobId
from service.api.schemas import LogList, problem_responses
from service.errors import EdgeKilnError, InvalidRequest
from service.ledger import views
from service.ledger.plan import RESOURCE_CLASSES
from service.recipes import require_known
from service.storage import ObjectStore, blob_key, check_stream

router = APIRouter(prefix="/v1", tags=["jobs"])

#: Attempts that one request may ask for by name.
MAX_SINCE = 50
_SINCE = re.compile(r"(\w{1,40}):(\d{1,9}):(\d{1,18})", re.ASCII)
_TAIL_BYTES = 16 << 10
_MAX_TAIL_BYTES = 1 << 20
#: All tails of one answer together; the attempts beyond it are listed without text.
_ANSWER_BYTES = 8 << 20


@router.get(
    "/jobs/{job_id}/logs",
    summary="Read a job's logs",
    response_model=None,
    responses={
        200: {
            "description": "One entry an attempt with the end of its log; with `Accept: text/plain`, all logs whole.",
            "model": LogList,
            "content": {"text/plain": {"schema": {"type": "string"}}},
        },
        **problem_responses(404),
    },
)
def list_logs(
    request: Request,
    context: ContextOf,
    tenant_id: ReadTenant,
    job_id: JobId,
    kind: Annotated[str | None, Query(description="Only steps of this kind.", examples=["convert"])] = None,
    tail_bytes: Annotated[int, Query(ge=0, le=_MAX_TAIL_BYTES, description="Most bytes of each log.")] = _TAIL_BYTES,
    since: Annotated[
        list[str],
        Query(
            max_length=MAX_SINCE,
            description="`STEP_ID:ATTEMPT:BYTES`, may be repeated: only these attempts, and of each only what follows.",
        ),
    ] = [],  # noqa: B006
) -> Response:
    """Return the logs of every attempt, in the order of the job's graph."""
    known = dict(map(_read_since, since))
    if kind is not None:
        require_known("step kind", kind, RESOURCE_CLASSES)
    entries = views.list_logs(context.database, tenant_id, job_id, kind)
    if _prefers_text(request.headers.get("accept", "")):
        return StreamingResponse(_print_logs(context.store, entries), media_type="text/plain; charset=utf-8")
    if known:
        entries = [entry for entry in entries if _attempt_of(entry) in known]
    left_bytes = _ANSWER_BYTES
    documents: dict[int, dict[str, Any]] = {}
    for place in sorted(range(len(entries)), key=lambda place: _order_of_interest(entries[place]), reverse=True):
        skip_bytes = known.get(_attempt_of(entries[place]), 0)
        documents[place] = _tail(context.store, entries[place], min(tail_bytes, left_bytes), skip_bytes)
        left_bytes -= len((documents[place]["text"] or "").encode())
    return JSONResponse({"logs": [documents[place] for place in range(len(entries))]})


def _order_of_interest(entry: Mapping[str, Any]) -> tuple[bool, str]:
    """Order attempts so that those that run come last, after those that ended late."""
    return entry["finished_at"] is None, entry["finished_at"] or entry["started_at"]


def _prefers_text(accept: str) -> bool:
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    return "text/plain" in kinds and "application/json" not in kinds


def _read_since(text: str) -> tuple[tuple[str, int], int]:
    match = _SINCE.fullmatch(text)
    if match is None:
        raise InvalidRequest("since: write STEP_ID:ATTEMPT:BYTES, as in `stp_1f0c9a2b3c4d5e6f:1:4096`.")
    return (match[1], int(match[2])), int(match[3])


def _attempt_of(entry: Mapping[str, Any]) -> tuple[str, int]:
    return entry["step_id"], entry["attempt"]


def _tail(store: ObjectStore, entry: dict[str, Any], tail_bytes: int, skip_bytes: int) -> dict[str, Any]:
    """Return an attempt with the end of its log, beyond the first `skip_bytes`."""
    digest, log_bytes = entry["log_digest"], entry.pop("log_bytes")
    live, live_bytes = entry.pop("live_log"), entry.pop("live_log_bytes")
    if digest is None:
        data = (live or "").encode()
        wanted_bytes = min(tail_bytes, max(0, (live_bytes or 0) - skip_bytes))
        shown = data[max(0, len(data) - wanted_bytes) :]
        text = None if live is None else shown.decode(errors="replace")
        is_cut = skip_bytes + len(shown) < (live_bytes or 0)
        document = {**entry, "size_bytes": live_bytes, "text": text, "truncated": is_cut}
        return {**document, "is_complete": entry["finished_at"] is not None and live is None}
    start = max(0, log_bytes - tail_bytes, min(skip_bytes, log_bytes))
    text = ""
    if start < log_bytes:
        with store.open(blob_key(digest), start=start) as chunks:
            text = b"".join(chunks).decode(errors="replace")
    return {**entry, "size_bytes": log_bytes, "text": text, "truncated": start > skip_bytes, "is_complete": True}


def _print_logs(store: ObjectStore, entries: list[dict[str, Any]]) -> Iterator[bytes]:
    for entry in entries:
        yield f"==> {entry['kind']} {entry['step_id']}, attempt {entry['attempt']}: {entry['state']}\n".encode()
        if entry["error"]:
            yield f"{entry['error']['code']}: {entry['error']['message']}\n".encode()
        if entry["log_digest"]:
            yield from _print_log(store, entry["log_digest"])
        elif entry["live_log"]:
            yield f"{entry['live_log'].rstrip()}\n".encode()


def _print_log(store: ObjectStore, digest: str) -> Iterator[bytes]:
    last = b"\n"
    try:
        with store.open(blob_key(digest)) as chunks:
            for chunk in check_stream(chunks, f"log {digest}", digest):
                yield chunk
                last = chunk or last
    except EdgeKilnError as error:
        yield f"\n{error.code}: {error.message}".encode()
        last = b""
    if not last.endswith(b"\n"):
        yield b"\n"
