"""Traces, as a real collector receives them from real processes: from a client's request to the publication."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.kiln import wait_for
from tests.light_fleet import light_fleet

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
SECRET = "do-not-tell"


@dataclass
class Collector:
    """What was received."""

    url: str
    spans: list[dict[str, Any]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    def receive(self, body: bytes) -> None:
        self.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = {each.key: each.value.string_value for each in resource.resource.attributes}["service.name"]
            for scope in resource.scope_spans:
                self.spans += [_read_span(service, span) for span in scope.spans]

    def find(self, name: str, **attributes: Any) -> list[dict[str, Any]]:
        """Return the spans of a name that have these attributes."""
        return [
            span
            for span in list(self.spans)
            if span["name"] == name
            and all(span["attributes"].get(f"edgekiln.{key}") == value for key, value in attributes.items())
        ]


def _read_span(service: str, span: Any) -> dict[str, Any]:
    return {
        "service": service,
        "name": span.name,
        "trace": span.trace_id.hex(),
        "id": span.span_id.hex(),
        "parent": span.parent_span_id.hex(),
        "links": [link.trace_id.hex() for link in span.links],
        "attributes": {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes},
    }


@contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector that speaks OTLP over HTTP."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            is_packed = self.headers.get("Content-Encoding") == "gzip"
            assert self.path == "/v1/traces"
            collector.receive(gzip.decompress(body) if is_packed else body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_job_is_one_trace_from_the_request_to_the_publication(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACEPARENT", TRACEPARENT)
    with collecting() as collector:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_EXPORTER_OTLP_HEADERS": f"authorization={SECRET}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        with light_fleet(tmp_path, environment=environment) as fleet:
            fleet.start_worker("one")
            source = fleet.write_model("traced")
            first = fleet.client.wait(fleet.submit(source))
            monkeypatch.delenv("TRACEPARENT")
            second = fleet.client.wait(fleet.submit(source))
            assert (first["state"], second["state"]) == ("succeeded", "succeeded"), fleet.log
            wait_for(lambda: len(collector.find("step publish")) == 2, "both publications were told")

    (request,) = [span for span in collector.find("POST /v1/jobs") if span["trace"] == TRACE]
    assert (request["parent"], request["service"]) == (PARENT, "edgekiln-api")
    assert request["attributes"]["http.response.status_code"] == 201
    attempts = [span for span in collector.spans if span["attributes"].get("edgekiln.reused") is False]
    mine = [span for span in attempts if span["trace"] == TRACE]
    assert {(span["parent"], span["service"]) for span in mine} == {(request["id"], "edgekiln-worker")}
    made = {step["id"]: step for step in first["steps"]}
    assert {span["attributes"]["edgekiln.step_id"] for span in mine} == set(made)
    (convert,) = [span for span in mine if span["name"] == "step convert"]
    expected = {"step_kind": "convert", "attempt": 1, "outcome": "succeeded", "job_id": first["id"]}
    assert {name: convert["attributes"][f"edgekiln.{name}"] for name in expected} == expected
    assert convert["attributes"]["edgekiln.step_key"] == made[convert["attributes"]["edgekiln.step_id"]]["key"]
    assert convert["attributes"]["edgekiln.peak_anon_bytes"] > 0
    assert convert["attributes"]["edgekiln.written_bytes"] > 0
    inside = [span["name"] for span in collector.spans if span["parent"] == convert["id"]]
    assert inside == ["fetch inputs", "child", "upload outputs", "commit"]

    # The second job finds the first one's work done; its trace is another.
    reused = {span["attributes"]["edgekiln.step_key"] for span in collector.spans if _is_reused(span)}
    assert reused == {step["key"] for step in second["steps"] if step["reused"]} != set()
    assert {span["trace"] for span in collector.spans if _is_reused(span)} == {_find_trace(attempts, second["id"])}
    assert SECRET.encode() not in b"".join(collector.bodies)
    assert str(tmp_path).encode() not in b"".join(collector.bodies), "what a job names is its tenant's"


def _is_reused(span: dict[str, Any]) -> bool:
    return span["attributes"].get("edgekiln.reused") is True


def _find_trace(attempts: list[dict[str, Any]], job_id: str) -> str:
    (trace,) = {span["trace"] for span in attempts if span["attributes"]["edgekiln.job_id"] == job_id}
    return str(trace)
