"""A step that needs more memory than it may use: its child ends, its worker does not."""

from __future__ import annotations

from pathlib import Path

from service.ledger.database import Database
from service.ledger.tables import Attempt, Step
from tests.chaos.conftest import Fire
from tests.kiln import read_rows


def peak_anon_bytes(data_dir: Path, kind: str) -> int:
    """Return what a step of this kind has used on this machine."""
    database = Database(f"sqlite:///{data_dir / 'ledger.db'}")
    try:
        (step,) = read_rows(database, Step, Step.kind == kind)
        (attempt,) = read_rows(database, Attempt, Attempt.step_id == step["id"])
    finally:
        database.close()
    return int(attempt["peak_anon_bytes"])


def test_a_child_beyond_its_memory_fails_and_its_worker_serves_on(
    fire: Fire, converted: Path, checkpoint: Path
) -> None:
    small, large = (peak_anon_bytes(converted / "data", kind) for kind in ("resolve", "plan"))
    limit_bytes = (small + large) // 2
    assert small < limit_bytes < large
    kiln = fire(step_memory_bytes=limit_bytes)
    worker_pid = kiln.worker_pid

    job_id = kiln.submit(checkpoint, recipes=["dynamic_int8"], formats=["tflite"])
    job = kiln.finished(job_id)
    assert job["state"] == "failed"
    step = kiln.step(job_id, "plan")
    assert step is not None
    assert step["error"]["code"] == "memory_limit_exceeded"
    assert step["error"]["details"]["memory_bytes"] == limit_bytes
    assert step["error"]["details"]["peak_anon_bytes"] > limit_bytes
    # A child that is over its limit at once may die before it has said anything.
    assert isinstance(step["error"]["details"]["log_tail"], str)
    assert step["peak_anon_bytes"] == step["error"]["details"]["peak_anon_bytes"]
    (variant,) = job["variants"]
    assert (variant["state"], variant["error"]["code"]) == ("failed", "memory_limit_exceeded")
    # Trying again would end the same way.
    (log,) = kiln.client.logs(job_id, "plan")
    assert (log["state"], log["error"]["code"]) == ("failed", "memory_limit_exceeded")

    assert kiln.client.readiness()["ready"]
    empty = checkpoint.parent / "empty"
    empty.mkdir(exist_ok=True)
    other = kiln.finished(kiln.submit(empty, recipes=["none"], formats=["tflite"]))
    assert other["state"] == "failed"
    errors = {variant["error"]["code"] for variant in other["variants"]}
    assert errors == {"checkpoint_invalid"}
    assert kiln.worker_pid == worker_pid


def test_what_headers_promise_too_much_of_is_refused_before_it_is_converted(
    fire: Fire, converted: Path, checkpoint: Path
) -> None:
    # The plan itself fits, and no conversion: its libraries alone need more.
    limit_bytes = 2 * peak_anon_bytes(converted / "data", "plan")
    kiln = fire(step_memory_bytes=limit_bytes)
    worker_pid = kiln.worker_pid

    # Another context than what is converted already, which would need no memory.
    job_id = kiln.submit(checkpoint, recipes=["dynamic_int8"], formats=["tflite"], context_length=32)
    job = kiln.finished(job_id)
    assert job["state"] == "failed"
    assert [step["kind"] for step in job["steps"]] == ["resolve", "fetch", "plan"]
    error = job["steps"][-1]["error"]
    assert error["code"] == "memory_insufficient"
    assert error["details"]["largest_memory_bytes"] == limit_bytes
    assert error["details"]["predicted_peak_anon_bytes"] > limit_bytes
    assert "GiB" in error["message"]
    (variant,) = job["variants"]
    assert (variant["state"], variant["error"]["code"]) == ("failed", "memory_insufficient")
    (log,) = kiln.client.logs(job_id, "plan")
    assert (log["attempt"], log["state"]) == (1, "failed")
    assert kiln.client.readiness()["ready"]
    assert kiln.worker_pid == worker_pid


def test_predictions_hold_for_the_example(converted: Path) -> None:
    """Beside what was really used: not so low that placement is a lottery, not so high that work is refused."""
    database = Database(f"sqlite:///{converted / 'data' / 'ledger.db'}")
    try:
        steps = read_rows(database, Step, Step.predicted_peak_anon_bytes.is_not(None))
        used = {
            step["id"]: read_rows(database, Attempt, Attempt.step_id == step["id"])[-1]["peak_anon_bytes"]
            for step in steps
        }
    finally:
        database.close()
    assert {step["kind"] for step in steps} >= {"reference", "convert", "quantize", "verify"}
    for step in steps:
        ratio = step["predicted_peak_anon_bytes"] / used[step["id"]]
        assert 0.6 < ratio < 1.7, (step["kind"], ratio)
