"""Every end of a child becomes figures or one typed error, whatever the child said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workers.sandbox.outcome import ChildResult, Limits, StopReason, describe_end

END: dict[str, Any] = {
    "exit_code": 0,
    "killed_for": None,
    "answer": None,
    "peak_anon_bytes": 5,
    "peak_rss_bytes": 7,
    "duration_s": 1.5,
}


def describe(tmp_path: Path, end: dict[str, Any] | None, **changes: Any) -> ChildResult:
    options: dict[str, Any] = {
        "pool": "light",
        "limits": Limits(10.0, 100),
        "stopped": None,
        "not_started": None,
        "isolation": {"isolation": "strong", "reasons": []},
        "output_dir": tmp_path,
        "log_path": tmp_path / "log.txt",
        "elapsed_s": 9.0,
    }
    return describe_end(end, **{**options, **changes})


def code_of(result: ChildResult) -> str:
    assert result.figures is None
    assert result.error is not None
    return str(result.error.to_json()["code"])


def test_answer_gives_figures(tmp_path: Path) -> None:
    result = describe(tmp_path, {**END, "answer": {"figures": {"a": 1}}})
    assert (result.figures, result.error, result.stopped) == ({"a": 1}, None, None)
    assert (result.peak_anon_bytes, result.peak_rss_bytes, result.duration_s) == (5, 7, 1.5)


def test_answer_before_the_stop_stands(tmp_path: Path) -> None:
    end = {**END, "killed_for": "stop", "answer": {"figures": {}}}
    result = describe(tmp_path, end, stopped=StopReason.LEASE_LOST)
    assert (result.figures, result.error, result.stopped) == ({}, None, None)


def test_vanished_supervisor_leaves_figures_missing(tmp_path: Path) -> None:
    result = describe(tmp_path, None)
    assert code_of(result) == "child_crashed"
    assert (result.peak_anon_bytes, result.peak_rss_bytes, result.duration_s) == (None, None, 9.0)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"killed_for": "deadline"}, "deadline_exceeded"),
        ({"killed_for": "memory"}, "memory_limit_exceeded"),
        ({"killed_for": "talk", "exit_code": -9}, "child_crashed"),
        ({"exit_code": -9}, "child_crashed"),
        ({"exit_code": -200}, "child_crashed"),
        ({"exit_code": 3}, "child_crashed"),
    ],
)
def test_ends_without_an_answer(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    assert code_of(describe(tmp_path, {**END, **changes})) == code


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"figures": 5},
        {"figures": None},
        {"error": "text"},
        {"error": {}},
        {"error": {"code": 1, "message": "m", "details": {}}},
        {"error": {"code": "c", "message": "m", "details": []}},
        {"error": {"code": "c", "message": "m", "details": {"message": "twice"}}},
    ],
)
def test_malformed_answers_are_crashes(tmp_path: Path, answer: dict[str, Any]) -> None:
    assert code_of(describe(tmp_path, {**END, "answer": answer})) == "child_crashed"


def test_memory_kill_blames_memory_only_when_the_worker_did_not(tmp_path: Path) -> None:
    foreign = describe(tmp_path, {**END, "exit_code": -9})
    assert foreign.error is not None
    assert "runs out of memory" in foreign.error.message
    own = describe(tmp_path, {**END, "exit_code": -9, "killed_for": "deadline"})
    assert own.error is not None
    assert "runs out of memory" not in own.error.message


def test_child_that_was_never_confined_is_weak(tmp_path: Path) -> None:
    result = describe(tmp_path, {**END, "exit_code": -11}, isolation=None)
    assert result.isolation == "weak"
    assert result.isolation_reasons
