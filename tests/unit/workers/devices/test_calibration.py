"""The method of measuring, on devices whose truth is known: a short form of `benchmarks/calibration.py`.

The bars are those of docs/devices.md less what so few devices are off by (300 intervals at 95 %: two to four percent);
the seeds are fixed, so that nothing here depends on the machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.calibration import judge_captures, judge_words
from benchmarks.simulated_devices import JUDGED
from service import difference
from workers.devices import statistics

DEVICES = 60


def judge_all(models: Sequence[Any], folder: Path) -> list[dict[str, Any]]:
    return [judge_captures(np.random.default_rng([5, n]), each, DEVICES, folder) for n, each in enumerate(models)]


def share(rows: Sequence[dict[str, Any]], verdict: str) -> float:
    return float(np.mean([row["verdicts"].get(verdict, 0.0) for row in rows]))


def test_throttling_is_recognised(tmp_path: Path) -> None:
    rows = judge_all(JUDGED.throttled, tmp_path)
    assert share(rows, "hot") >= 0.95
    assert share(rows, "stable") <= 0.02


def test_control_the_rule_that_every_sample_must_fall_misses_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def every_one_falls(samples: Sequence[float], *, less_is_better: bool) -> bool:
        speeds = [1 / sample for sample in samples] if less_is_better else samples
        return all(later < earlier for earlier, later in itertools.pairwise(speeds)) and speeds[-1] < 0.97 * speeds[0]

    monkeypatch.setattr(statistics, "_is_throttling", every_one_falls)
    assert share(judge_all(JUDGED.throttled, tmp_path), "hot") < 0.5


def test_healthy_phones_are_stable_and_intervals_hold_their_median(tmp_path: Path) -> None:
    rows = judge_all(JUDGED.healthy, tmp_path)
    assert share(rows, "hot") <= 0.05
    assert share(rows, "stable") >= 0.9
    assert np.mean([row["coverage"] for row in rows]) >= 0.9


def test_control_intervals_of_the_middle_samples_do_not_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "find_interval", lambda values: tuple(np.percentile(values, (25, 75))))
    assert np.mean([row["coverage"] for row in judge_all(JUDGED.healthy, tmp_path)]) < 0.8


def compare_all(true_difference: float, folder: Path) -> list[dict[str, Any]]:
    return [
        judge_words(np.random.default_rng([6, n]), model, DEVICES, true_difference, folder)
        for n, model in enumerate(JUDGED.healthy)
    ]


def find(rows: Sequence[dict[str, Any]], *words: str) -> float:
    return float(np.mean([sum(row["words"].get(word, 0.0) for word in words) for row in rows]))


def test_equals_are_rarely_told_apart_and_a_fifth_is_seen(tmp_path: Path) -> None:
    assert find(compare_all(0.0, tmp_path), "faster", "slower") <= 0.05
    far = compare_all(0.2, tmp_path)
    assert find(far, "faster") >= 0.9
    assert find(far, "slower") == 0.0


def test_control_medians_alone_tell_equals_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_medians(one: Sequence[float], other: Sequence[float], *, is_paired: bool = False) -> tuple[float, float]:
        ratio = float(np.median(other) / np.median(one))
        return ratio, ratio

    monkeypatch.setattr(difference, "find_ratio_interval", of_medians)
    assert find(compare_all(0.0, tmp_path), "faster", "slower") > 0.05
