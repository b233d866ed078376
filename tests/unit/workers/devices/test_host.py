"""The benchmark step around the measured process: what it pools, keeps, and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.errors import BenchmarkFailed, UnknownName
from workers.devices import host

#: Runs the benchmark step on planned answers.
Capture = Callable[..., dict[str, Any]]


def ignore(message: str, fraction: float | None = None) -> None:
    """Take progress."""


def answer(speed: float = 100.0, **changes: Any) -> dict[str, Any]:
    return {
        "init_s": 0.5,
        "ttft_s": 0.01,
        "prefill_tokens": 128,
        "prefill_tokens_per_s": speed * 10,
        "decode_tokens": 128,
        "decode_tokens_per_s": speed,
        "peak_rss_bytes": int(speed) << 20,
        "peak_anon_bytes": int(speed) << 20,
        **changes,
    }


@pytest.fixture
def capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Capture:
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    for suffix in ("tflite", "task", "litertlm"):
        (artifact / f"model.{suffix}").write_bytes(b"")
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    plan = tmp_path / "plan.json"
    monkeypatch.setenv("EDGEKILN_TEST_PLAN", str(plan))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(host, "INSTRUMENT", "canned_instrument")

    def run(answers: list[Any], **params: Any) -> dict[str, Any]:
        plan.write_text(json.dumps(answers))
        figures = host.run({"format": "litertlm", "processes": 3, **params}, {"artifact": artifact}, output_dir, ignore)
        assert json.loads(plan.read_text()) == []
        return figures

    return run


def test_cold_process_is_never_pooled(capture: Capture, tmp_path: Path) -> None:
    figures = capture([answer(1), answer(100), answer(102), answer(101)])
    assert figures["decode_tokens_per_s"] == {
        "median": 101.0,
        "p90": pytest.approx(101.8),
        "mad": 1.0,
        "interval": None,
        "samples": [100.0, 102.0, 101.0],
    }
    assert figures["prefill_tokens_per_s"]["median"] == 1010.0
    assert figures["cold"]["decode_tokens_per_s"] == 1.0
    assert figures["processes"] == 3
    assert figures["verdict"] == "stable"
    kept = json.loads((tmp_path / "out" / "measurement.json").read_text())
    assert kept["cold"]["decode_tokens_per_s"] == 1.0
    assert [sample["decode_tokens_per_s"] for sample in kept["captures"][0]["samples"]] == [100.0, 102.0, 101.0]


def test_memory_is_the_largest_of_the_warm_processes(capture: Capture) -> None:
    figures = capture([answer(900), answer(300), answer(310), answer(305)])
    assert figures["peak_rss_bytes"] == 310 << 20
    assert figures["peak_anon_bytes"] == 310 << 20
    assert figures["cold"]["peak_anon_bytes"] == 900 << 20


def test_samples_far_apart_are_kept_and_measured_once_more(capture: Capture, tmp_path: Path) -> None:
    noisy, again = [answer(50), answer(100), answer(200)], [answer(80), answer(120), answer(240)]
    figures = capture([answer(), *noisy, *again])
    assert figures["verdict"] == "noisy"
    # The last capture counts, whatever it says: the better one is not picked.
    assert figures["decode_tokens_per_s"]["samples"] == [80.0, 120.0, 240.0]
    kept = json.loads((tmp_path / "out" / "measurement.json").read_text())["captures"]
    assert [capture["verdict"] for capture in kept] == ["noisy", "noisy"]
    assert [sample["decode_tokens_per_s"] for sample in kept[0]["samples"]] == [50.0, 100.0, 200.0]


def test_a_second_capture_can_be_stable(capture: Capture) -> None:
    figures = capture([answer(), answer(50), answer(100), answer(200), *[answer()] * 3])
    assert (figures["verdict"], figures["captures"]) == ("stable", 2)


def test_fewer_tokens_than_asked_are_marked(capture: Capture) -> None:
    figures = capture([answer(decode_tokens=96)] * 4)
    assert figures["verdict"] == "short"
    assert figures["decode_tokens"] == 96


def test_two_processes_are_too_few(capture: Capture) -> None:
    assert capture([answer()] * 3, processes=2)["verdict"] == "short"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"decode_tokens_per_s": 0.0}, "decode_tokens_per_s = 0.0"),
        ({"decode_tokens": 0}, "decode_tokens = 0"),
        ({"prefill_tokens_per_s": None}, "no prefill_tokens_per_s"),
        ({"ttft_s": -1.0}, "ttft_s = -1.0"),
        ({"decode_tokens_per_s": float("nan")}, "decode_tokens_per_s = nan"),
        ({"peak_rss_bytes": None}, "no peak_rss_bytes"),
    ],
)
def test_zero_or_missing_figure_fails_whatever_the_exit_code(
    capture: Capture, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(BenchmarkFailed, match=named):
        capture([answer(), answer(), answer(**changes)])


def test_missing_artifact_fails(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkFailed, match=r"no model\.task"):
        host.run({"format": "task"}, {"artifact": tmp_path}, tmp_path, ignore)


def test_unknown_format_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="tflite"):
        host.run({"format": "tflit"}, {"artifact": tmp_path}, tmp_path, ignore)


def test_crash_tells_what_the_runtime_said(capture: Capture) -> None:
    with pytest.raises(BenchmarkFailed, match="the graph is broken") as caught:
        capture([answer(), "crash"])
    assert "process 1 of 3 ended with status -6" in caught.value.message
    assert any("the graph is broken" in line for line in caught.value.details["log"])


def test_exit_code_of_zero_without_an_answer_fails(capture: Capture) -> None:
    with pytest.raises(BenchmarkFailed, match="no answer"):
        capture(["silent"])


def test_hung_process_is_killed_at_its_deadline(capture: Capture) -> None:
    with pytest.raises(BenchmarkFailed, match="did not end within"):
        capture(["hang"], process_deadline_s=0.2)


def test_graph_latency_is_summarized_over_processes(capture: Capture) -> None:
    def times(base: float) -> dict[str, Any]:
        latency_ms = {"prefill_8": [base * 4] * 3, "decode": [base, base + 1, base + 2]}
        return {"init_s": 0.1, "latency_ms": latency_ms, "peak_rss_bytes": 1, "peak_anon_bytes": 1}

    figures = capture([times(500), times(10), times(10.2), times(10.1)], format="tflite")
    decode = figures["latency_ms"]["decode"]
    assert decode["samples"] == [11.0, 11.2, 11.1]
    assert decode["median"] == 11.1
    assert decode["iterations"]["count"] == 9
    assert decode["iterations"]["p50"] == pytest.approx(11.1)
    assert figures["cold"]["first_ms"] == {"prefill_8": 2000.0, "decode": 500.0}
    assert figures["verdict"] == "stable"
    assert "decode_tokens_per_s" not in figures


def test_graph_without_a_timed_run_fails(capture: Capture) -> None:
    empty = {"init_s": 0.1, "latency_ms": {"decode": []}, "peak_rss_bytes": 1, "peak_anon_bytes": 1}
    with pytest.raises(BenchmarkFailed, match="no latency_ms of decode"):
        capture([empty], format="tflite")


def test_process_is_told_what_was_asked(capture: Capture, tmp_path: Path) -> None:
    figures = capture([answer()] * 4, threads=3, prefill_tokens=7, decode_tokens=9)
    kept = json.loads((tmp_path / "out" / "measurement.json").read_text())
    seen = kept["captures"][0]["samples"][0]["seen_request"]
    assert (seen["threads"], seen["prefill_tokens"], seen["decode_tokens"]) == (3, 7, 9)
    assert not Path(seen["cache_dir"]).is_relative_to(tmp_path / "artifact")
    assert figures["threads"] == 3
