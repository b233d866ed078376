"""What the attempts of a job's steps wrote: the ends as JSON, or everything as text; of those that run, the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from service.api.context import ContextOf, ReadTenant
from service.api.jobs import JobId
from service.api.schemas import LogList, problem_responses
from service.errors import EdgeKilnError
from service.ledger import views
from service.ledger.plan import RESOURCE_CLASSES
from service.recipes import require_known
from service.storage import ObjectStore, blob_key, check_stream

router = APIRouter(prefix="/v1", tags=["jobs"])

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
) -> Response:
    """Return the logs of every attempt, in the order of the job's graph."""
    if kind is not None:
        require_known("step kind", kind, RESOURCE_CLASSES)
    entries = views.list_logs(context.database, tenant_id, job_id, kind)
    if _prefers_text(request.headers.get("accept", "")):
        return StreamingResponse(_print_logs(context.store, entries), media_type="text/plain; charset=utf-8")
    left_bytes = _ANSWER_BYTES
    documents: dict[int, dict[str, Any]] = {}
    for place in sorted(range(len(entries)), key=lambda place: _order_of_interest(entries[place]), reverse=True):
        documents[place] = _tail(context.store, entries[place], min(tail_bytes, left_bytes))
        left_bytes -= len((documents[place]["text"] or "").encode())
    return JSONResponse({"logs": [documents[place] for place in range(len(entries))]})


def _order_of_interest(entry: Mapping[str, Any]) -> tuple[bool, str]:
    """Order attempts so that those that run come last, after those that ended late."""
    return entry["finished_at"] is None, entry["finished_at"] or entry["started_at"]


def _prefers_text(accept: str) -> bool:
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    return "text/plain" in kinds and "application/json" not in kinds


def _tail(store: ObjectStore, entry: dict[str, Any], tail_bytes: int) -> dict[str, Any]:
    """Return an attempt with the end of its log."""
    digest = entry["log_digest"]
    live, live_bytes = entry.pop("live_log"), entry.pop("live_log_bytes")
    if digest is None:
        data = (live or "").encode()
        shown = data[max(0, len(data) - tail_bytes) :]
        text = None if live is None else shown.decode(errors="replace")
        document = {**entry, "size_bytes": live_bytes, "text": text, "truncated": len(shown) < (live_bytes or 0)}
        return {**document, "is_complete": entry["finished_at"] is not None and live is None}
    key = blob_key(digest)
    size_bytes = store.stat(key).size_bytes
    start = max(0, size_bytes - tail_bytes)
    with store.open(key, start=start) as chunks:
        text = b"".join(chunks).decode(errors="replace")
    return {**entry, "size_bytes": size_bytes, "text": text, "truncated": start > 0, "is_complete": True}


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
