"""OpenTelemetry traces: from the request that submits a job to the attempt that publishes its artifacts.

Owns when spans are made and how a trace goes on in another process. Off, at the cost of one comparison, unless the
standard variables name a collector (`OTEL_EXPORTER_OTLP_ENDPOINT`, or `..._TRACES_ENDPOINT`): the library is imported
only then. Called by the entries of the processes, `service.api`, `service.client` and `workers.runner`.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

#: Header, and the variable in which a pipeline hands its trace to the programs it starts (W3C Trace Context).
TRACEPARENT = "traceparent"
_VARIABLE = "TRACEPARENT"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
#: How long the end of a process waits for a collector to take the last spans.
_FLUSH_MS = 2000

_provider: TracerProvider | None = None


class Span(Protocol):
    """What callers tell a span; None is left out."""

    def note(self, **attributes: Any) -> None:
        """Add attributes: `a_b` is `edgekiln.a_b`, and `http__route` the field's own `http.route`."""

    def fail(self, description: str) -> None:
        """Say that what the span stands for has failed."""

    def rename(self, name: str) -> None:
        """Give it the name that is known only now."""


class _NoSpan:
    def note(self, **attributes: Any) -> None:
        return None

    def fail(self, description: str) -> None:
        return None

    def rename(self, name: str) -> None:
        return None


_NO_SPAN = _NoSpan()


class _RealSpan:
    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def note(self, **attributes: Any) -> None:
        self._span.set_attributes(_name(attributes))

    def fail(self, description: str) -> None:
        from opentelemetry.trace import StatusCode

        self._span.set_status(StatusCode.ERROR, description)

    def rename(self, name: str) -> None:
        self._span.update_name(name)


def is_on() -> bool:
    """Whether this process makes spans."""
    return _provider is not None


def is_wanted(environment: Mapping[str, str]) -> bool:
    """Whether the standard variables ask for traces."""
    is_off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    is_off = is_off or environment.get("OTEL_TRACES_EXPORTER") == "none"
    return not is_off and any(environment.get(name) for name in _ENDPOINTS)


def begin_tracing(service_name: str) -> None:
    """Send this process's spans to the collector that the environment names, if it names one.

    `service_name` is what the process is called there, unless `OTEL_SERVICE_NAME` says otherwise.
    """
    global _provider
    if _provider is not None or not is_wanted(os.environ):
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME") or service_name})
    # Its own end at exit would wait for a collector that is away.
    _provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))


def end_tracing() -> None:
    """Send what has not been sent, if the collector takes it."""
    if _provider is not None:
        _provider.force_flush(_FLUSH_MS)


@contextmanager
def request_span(name: str, traceparent: str | None) -> Iterator[Span]:
    """Make the span of a request; its trace is the client's, if it has one."""
    if _provider is None:
        yield _NO_SPAN
        return
    from opentelemetry.trace import SpanKind

    parent = None if traceparent is None else _read_parent(traceparent)
    with _start(name, _as_context(parent), kind=SpanKind.SERVER) as span:
        yield span


@contextmanager
def attempt_span(name: str, jobs: Iterable[tuple[str, str | None]], **attributes: Any) -> Iterator[Span]:
    """Make the span of an attempt, in the trace of the first of its `jobs` and linked to those of the others.

    `jobs`: ids with the `traceparent` of their submissions; the trace of one without is known by its id alone, so that
    all processes agree on it.
    """
    if _provider is None:
        yield _NO_SPAN
        return
    from opentelemetry.trace import Link, SpanKind

    parents = [(traceparent and _read_parent(traceparent)) or _derive_parent(job_id) for job_id, traceparent in jobs]
    links = [Link(_as_span_context(parent)) for parent in parents[1:]]
    context = _as_context(parents[0] if parents else None)
    with _start(name, context, kind=SpanKind.CONSUMER, links=links, attributes=_name(attributes)) as span:
        yield span


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[Span]:
    """Make a span below the current one."""
    if _provider is None:
        yield _NO_SPAN
        return
    with _start(name, None, attributes=_name(attributes)) as made:
        yield made


def current_traceparent() -> str | None:
    """Return the trace context to hand on: of the current span, or else of the process that started this one.

    A user's program may use the library without this module, and its spans count; it is not imported for that.
    """
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry import trace

        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    inherited = os.environ.get(_VARIABLE, "")
    return inherited if _TRACEPARENT.fullmatch(inherited) else None


@contextmanager
def _start(name: str, context: Any, **options: Any) -> Iterator[_RealSpan]:
    assert _provider is not None
    tracer = _provider.get_tracer("edgekiln")
    # Errors are told by `fail`, in a sentence: a stack may quote what is not the collector's.
    with tracer.start_as_current_span(
        name, context=context, record_exception=False, set_status_on_exception=False, **options
    ) as started:
        yield _RealSpan(started)


def _read_parent(traceparent: str) -> tuple[int, int, int] | None:
    """Return trace, span and flags; None for what is no trace context."""
    found = _TRACEPARENT.fullmatch(traceparent)
    return None if found is None else (int(found[1], 16), int(found[2], 16), int(found[3], 16))


def _derive_parent(job_id: str) -> tuple[int, int, int]:
    digest = hashlib.sha256(job_id.encode()).digest()
    return int.from_bytes(digest[:16]), int.from_bytes(digest[16:24]), 1


def _as_span_context(parent: tuple[int, int, int]) -> trace.SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(parent[0], parent[1], is_remote=True, trace_flags=TraceFlags(parent[2]))


def _as_context(parent: tuple[int, int, int] | None) -> Any:
    """Return the context that a span begins in: its parent's, or none at all."""
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, set_span_in_context

    return Context() if parent is None else set_span_in_context(NonRecordingSpan(_as_span_context(parent)), Context())


def _name(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.replace("__", ".") if "__" in name else f"edgekiln.{name}": value
        for name, value in attributes.items()
        if value is not None
    }
