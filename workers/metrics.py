"""What one worker process counts for Prometheus.

Owns names, labels and buckets. Called by `workers.runner` and `workers.transfer`; served by `service.metrics`.
"""

from __future__ import annotations

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram

Outcome = Literal["succeeded", "failed", "retried", "given_back", "stopped", "lost"]

#: From a step without a child to a conversion of hours.
_SECONDS = (0.05, 0.2, 1, 5, 20, 60, 180, 600, 1800, 3600, 3 * 3600)
#: Used over predicted memory; the aim is within a quarter.
_RATIOS = (0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)

REGISTRY = CollectorRegistry()

_step_seconds = Histogram(
    "edgekiln_step_seconds",
    "How long attempts took from claim to end.",
    ["kind", "outcome"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
_memory_ratio = Histogram(
    "edgekiln_memory_used_ratio",
    "Peak anonymous memory over what was predicted.",
    ["kind"],
    buckets=_RATIOS,
    registry=REGISTRY,
)
_steps_joined = Counter(
    "edgekiln_steps_joined", "Steps that plans found done or under way.", ["kind"], registry=REGISTRY
)
_store_bytes = Counter("edgekiln_store_bytes", "Bytes of steps moved.", ["direction"], registry=REGISTRY)


def record_attempt(kind: str, outcome: Outcome, duration_s: float) -> None:
    """Count one attempt; `lost` are those whose lease did not hold, `retried` those that failed for now."""
    _step_seconds.labels(kind, outcome).observe(duration_s)


def record_memory(kind: str, predicted_bytes: int | None, used_bytes: int | None) -> None:
    """Count how a prediction came true, where there was one."""
    if predicted_bytes and used_bytes:
        _memory_ratio.labels(kind).observe(used_bytes / predicted_bytes)


def record_reuse(kind: str) -> None:
    """Count a step that a plan did not have to make."""
    _steps_joined.labels(kind).inc()


def record_bytes(direction: Literal["read", "cached", "written"], size_bytes: int) -> None:
    """Count bytes between the store, or this host's cache of it, and a step's folder."""
    _store_bytes.labels(direction).inc(size_bytes)
