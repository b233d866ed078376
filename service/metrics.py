"""Metrics for Prometheus, on a port of their own.

Owns the port and what the ledger tells at each scrape; what a worker counts itself is `workers.metrics`. Figures cover
all tenants and name none. Called by the entries of the processes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.errors import InvalidSettings
from service.ledger.counts import Totals, read_counts, read_totals
from service.ledger.database import Database

#: Totals are kept this many times as long as adding them up took.
_REST = 50.0


def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> None:
    """Answer `GET /metrics` from a thread for as long as the process lives; port 0 means not at all.

    Raises `InvalidSettings` when the address is taken.
    """
    if port == 0:
        return
    try:
        start_http_server(port, host, registry)
    except OSError as error:
        raise InvalidSettings(
            f"Metrics cannot be served on {host}:{port}: {error.strerror}. Choose another port for this process."
        ) from error


class LedgerCollector(Collector):
    """What the ledger holds at this moment; totals may be older, lest scrapes keep a large ledger busy."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._totals: Totals | None = None
        self._kept_until = 0.0

    def _read_totals(self) -> Totals:
        with self._lock:
            started = time.monotonic()
            if self._totals is None or started >= self._kept_until:
                self._totals = read_totals(self._database)
                ended = time.monotonic()
                self._kept_until = ended + _REST * (ended - started)
            return self._totals

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges."""
        counts, totals = read_counts(self._database), self._read_totals()
        steps = GaugeMetricFamily("edgekiln_steps", "Unfinished steps.", labels=["resource_class", "state"])
        for (resource_class, state), number in counts.steps.items():
            steps.add_metric([resource_class, state], number)
        yield steps
        oldest = GaugeMetricFamily(
            "edgekiln_oldest_queued_step_seconds", "Age of the step that has waited longest.", labels=["resource_class"]
        )
        for resource_class, age_s in counts.oldest_queued_s.items():
            oldest.add_metric([resource_class], age_s)
        yield oldest
        jobs = GaugeMetricFamily("edgekiln_jobs", "Unfinished jobs.", labels=["state"])
        for state, number in counts.jobs.items():
            jobs.add_metric([state], number)
        yield jobs
        yield GaugeMetricFamily("edgekiln_workers", "Workers heard of lately.", counts.workers)
        yield GaugeMetricFamily("edgekiln_steps_reused", "Steps that jobs found done or under way.", totals.reused)
        yield GaugeMetricFamily("edgekiln_blobs", "Files that the ledger knows in the store.", totals.blobs)
        yield GaugeMetricFamily("edgekiln_blob_bytes", "Their size.", totals.blob_bytes)
