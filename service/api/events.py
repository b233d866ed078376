"""A job's events as a stream (server-sent events).

The ledger numbers events without gaps, so a client that reconnects with `Last-Event-ID` misses none and sees none
twice. The stream reads the ledger, not a broker: it survives the loss of every message.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, Header, Query
from fastapi.responses import StreamingResponse

from service.api.context import Context, ContextOf, ReadTenant
from service.api.jobs import JobId
from service.api.schemas import problem_responses
from service.errors import EdgeKilnError, InvalidRequest
from service.ledger import views

router = APIRouter(prefix="/v1", tags=["jobs"])

#: How often the ledger is asked for news.
_POLL_S = 0.3
#: How often a silent stream says that it lives; proxies give up on silence after a minute or so.
_KEEPALIVE_S = 15.0
_RECONNECT_MS = 1000

_STREAM_EXAMPLE = 'id: 7\nevent: step\ndata: {"step_id": "step_4d", "kind": "convert", "state": "running"}\n\n'


@router.get(
    "/jobs/{job_id}/events",
    summary="Follow a job",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "`job`, `step`, `progress`, `variant` and `regression`, each with its number as `id`. "
            "When the job has ended and all were sent, one `end` without a number closes the stream.",
            "content": {"text/event-stream": {"schema": {"type": "string"}, "example": _STREAM_EXAMPLE}},
        },
        **problem_responses(404),
    },
)
def stream_events(
    context: ContextOf,
    tenant_id: ReadTenant,
    job_id: JobId,
    after: Annotated[int, Query(ge=0, description="Send only events with higher numbers.")] = 0,
    last_event_id: Annotated[
        str | None, Header(description="Number of the last event seen; wins over `after`.")
    ] = None,
) -> StreamingResponse:
    """Send what has happened, then what happens, until the job ends."""
    start = _parse_number(last_event_id) if last_event_id else after
    # Read before answering: an unknown job is a problem document, not a broken stream.
    first = views.read_events(context.database, tenant_id, job_id, start)
    return StreamingResponse(
        _stream(context, tenant_id, job_id, start, first),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


def _parse_number(text: str) -> int:
    # Longer numbers do not fit the ledger's column.
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise InvalidRequest(f"Last-Event-ID must be the number of an event, not {text[:40]!r}.")
    return int(text)


async def _stream(
    context: Context, tenant_id: str, job_id: str, after: int, page: dict[str, Any]
) -> AsyncIterator[str]:
    yield f"retry: {_RECONNECT_MS}\n\n"
    spoken_at = time.monotonic()
    while True:
        for event in page["events"]:
            after = event["number"]
            data = json.dumps({**event["data"], "created_at": event["created_at"]})
            yield f"id: {after}\nevent: {event['kind']}\ndata: {data}\n\n"
            spoken_at = time.monotonic()
        if page["is_final"]:
            yield "event: end\ndata: {}\n\n"
            return
        if context.stopping.is_set():
            return
        if not page["events"]:
            if time.monotonic() - spoken_at >= _KEEPALIVE_S:
                yield ": still here\n\n"
                spoken_at = time.monotonic()
            await anyio.sleep(_POLL_S)
        try:
            page = await anyio.to_thread.run_sync(views.read_events, context.database, tenant_id, job_id, after)
        except EdgeKilnError:
            # The job was removed meanwhile; the client's next attempt is told so.
            return
