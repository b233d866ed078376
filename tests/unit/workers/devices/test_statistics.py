"""Figures and verdicts, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from workers.devices.statistics import Verdict, judge, percentiles, summarize, worst


def test_summary_of_known_samples() -> None:
    summary = summarize([10.0, 12.0, 11.0, 50.0, 9.0])
    assert summary.median == 11.0
    # Deviations from 11: 1, 1, 0, 39, 2.
    assert summary.mad == 1.0
    # Sorted: 9 10 11 12 50; rank 3.6.
    assert summary.p90 == pytest.approx(12 + 0.6 * 38)
    assert summary.spread == pytest.approx(1.4826 / 11)
    assert summary.to_json()["samples"] == [10.0, 12.0, 11.0, 50.0, 9.0]


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
def test_no_figure_is_made_of_nothing(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="No figure"):
        summarize(samples)


def test_percentiles_interpolate() -> None:
    found = percentiles([float(value) for value in range(101)])
    assert found == {"count": 101, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}


@pytest.mark.parametrize(
    ("samples", "asked", "verdict"),
    [
        ([100.0, 101.0, 99.0, 100.5, 99.5], 5, Verdict.STABLE),
        # One outlier in five does not move a robust spread.
        ([100.0, 101.0, 20.0, 99.0, 100.5], 5, Verdict.STABLE),
        # As the last one it may be a phone that has begun to throttle: nobody knows, so it is measured again.
        ([100.0, 101.0, 99.0, 100.5, 20.0], 5, Verdict.HOT),
        ([100.0, 130.0, 70.0, 115.0, 85.0], 5, Verdict.NOISY),
        # Slower with every process: the device holds its clocks down, whatever it says.
        ([100.0, 97.0, 95.0, 92.0, 90.0], 5, Verdict.HOT),
        # The same with a sample out of order, and in one step.
        ([100.0, 97.0, 98.0, 91.0, 92.0, 86.0], 6, Verdict.HOT),
        ([100.0, 101.0, 99.0, 85.0, 86.0, 84.0], 6, Verdict.HOT),
        # The same falls within what phones differ by anyway.
        ([100.0, 99.0, 98.5, 97.0, 96.0], 5, Verdict.STABLE),
        # Faster with every process: it has warmed up.
        ([85.0, 86.0, 90.0, 95.0, 97.0, 100.0], 6, Verdict.STABLE),
        ([100.0, 101.0, 99.0, 100.5], 5, Verdict.SHORT),
        ([100.0, 100.0], 2, Verdict.SHORT),
        ([100.0, 100.0, 0.0], 3, Verdict.DEAD),
        ([100.0, None, 100.0], 3, Verdict.DEAD),
        ([100.0, math.nan, 100.0], 3, Verdict.DEAD),
        ([], 3, Verdict.DEAD),
    ],
)
def test_verdicts(samples: list[float | None], asked: int, verdict: Verdict) -> None:
    assert judge(samples, asked) is verdict


def test_times_that_grow_are_hot() -> None:
    assert judge([10.0, 10.4, 10.8, 11.2], 4, less_is_better=True) is Verdict.HOT
    assert judge([11.2, 10.8, 10.4, 10.0], 4, less_is_better=True) is Verdict.STABLE


def test_a_repetition_at_the_level_that_the_first_capture_fell_to_is_hot() -> None:
    fell, stayed, back = [100.0, 101.0, 99.0, 80.0, 81.0, 79.0], [80.0] * 6, [100.0, 99.0, 101.0, 100.0, 99.0, 101.0]
    assert judge(stayed, 6) is Verdict.STABLE, "control: of itself it shows nothing"
    assert judge(stayed, 6, earlier=fell) is Verdict.HOT
    assert judge(back, 6, earlier=fell) is Verdict.STABLE


def test_an_interval_needs_six_samples() -> None:
    assert summarize([1.0, 2.0, 3.0, 4.0, 5.0]).interval is None
    # Of six, the median lies between the smallest and the largest with 1 - 2 / 2**6.
    assert summarize([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]).interval == (1.0, 6.0)
    assert summarize([float(value) for value in range(1, 12)]).interval == (2.0, 10.0)


def test_less_work_than_asked_is_short() -> None:
    assert judge([100.0] * 5, 5, is_cut=True) is Verdict.SHORT


def test_worst_verdict_wins() -> None:
    assert worst([Verdict.STABLE, Verdict.SHORT, Verdict.NOISY]) is Verdict.SHORT
    assert worst([Verdict.NOISY, Verdict.DEAD]) is Verdict.DEAD
    assert worst([]) is Verdict.STABLE
