"""Traces cost nothing when they are off, and take no nonsense from clients."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from service import tracing

GOOD = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("environment", "is_wanted"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "mine"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_the_standard_variables_decide(environment: dict[str, str], is_wanted: bool) -> None:
    assert tracing.is_wanted(environment) is is_wanted


def test_nothing_is_imported_or_made_while_it_is_off() -> None:
    program = (
        "import sys; from service import tracing; tracing.begin_tracing('x')\n"
        "with tracing.attempt_span('step', [('job_1', None)], a=1) as span: span.note(b=2)\n"
        "with tracing.request_span('GET', None), tracing.span('inner'): pass\n"
        "assert tracing.current_traceparent() is None and not tracing.is_on()\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "TRACEPARENT"))}
    subprocess.run([sys.executable, "-c", program], check=True, env=clean)


@pytest.mark.parametrize(
    "nonsense", ["", "x", GOOD[:-1], GOOD + "0", "00-" + "0" * 32 + GOOD[35:], GOOD.upper(), f"{GOOD}\n"]
)
def test_what_is_no_trace_context_is_passed_over(nonsense: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracing._read_parent(nonsense) is None
    monkeypatch.setenv("TRACEPARENT", nonsense)
    assert tracing.current_traceparent() is None


def test_a_pipelines_trace_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACEPARENT", GOOD)
    assert tracing.current_traceparent() == GOOD
