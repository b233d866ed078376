"""From samples to a figure that can be trusted, or a word that says why not. Pure.

Owns median, p90, MAD and the verdict on a capture. A sample is one fresh process: the spread inside a process is
small, between processes it is large. Called by every device of `workers.devices`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

#: Below this many processes a median says little.
LEAST_SAMPLES = 3
#: How sure an interval is to hold the median that no end of processes would have.
CONFIDENCE = 0.95
#: From these on an interval of that confidence exists at all: with five, even the whole range holds it in 94 of 100.
LEAST_FOR_INTERVAL = 6
#: A fall of the samples, each below the one before, by more than this share looks like throttling.
HOT_FALL = 0.03
#: A robust standard deviation above this share of the median marks a capture as noisy. Processes of one model on
#: one phone routinely differ by a tenth.
NOISY_SPREAD = 0.10


class Verdict(StrEnum):
    """What a capture is worth, from best to worst."""

    STABLE = "stable"
    #: Kept and marked: the samples lie too far apart.
    NOISY = "noisy"
    #: Kept and marked: the device held its clocks down, by its own account or by the look of the samples.
    HOT = "hot"
    #: Fewer samples or fewer tokens than were asked for.
    SHORT = "short"
    #: Zero or a missing figure: nothing ran.
    DEAD = "dead"


_ORDER = list(Verdict)


@dataclass(frozen=True)
class Summary:
    """One figure over several processes, in the unit of its samples."""

    median: float
    p90: float
    #: Median absolute deviation from the median, unscaled.
    mad: float
    #: Bounds of the median, with CONFIDENCE; None below LEAST_FOR_INTERVAL samples.
    interval: tuple[float, float] | None
    #: One sample a process, in the order of the processes.
    samples: tuple[float, ...]

    @property
    def spread(self) -> float:
        """MAD, scaled to a standard deviation of a normal distribution, as a share of the median."""
        return float(self.mad * 1.4826 / self.median) if self.median > 0 else float("inf")

    def to_json(self) -> dict[str, Any]:
        """Return median, p90, mad, interval and samples as JSON values."""
        return {
            "median": self.median,
            "p90": self.p90,
            "mad": self.mad,
            "interval": None if self.interval is None else list(self.interval),
            "samples": list(self.samples),
        }


def summarize(samples: Sequence[float]) -> Summary:
    """Summarize at least one finite sample; raises ValueError for none or for NaN."""
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"No figure can be made of the samples {list(samples)!r}.")
    median = np.median(values)
    return Summary(
        median=float(median),
        p90=float(np.percentile(values, 90)),
        mad=float(np.median(np.abs(values - median))),
        interval=find_interval(values),
        samples=tuple(float(value) for value in values),
    )


def find_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """Return the bounds of the median that its order statistics give, exact for samples of any distribution.

    Bootstrap intervals of medians are too narrow for so few samples (decision 22).
    """
    if len(values) < LEAST_FOR_INTERVAL:
        return None
    # Takes a second to import, and only a finished capture needs it.
    from scipy.stats import quantile_test

    found = quantile_test(np.asarray(values), p=0.5).confidence_interval(CONFIDENCE)
    return float(found.low), float(found.high)


def percentiles(samples: Sequence[float]) -> dict[str, float | int]:
    """Return count, p50, p90, p95, p99 of all iterations of all processes, in the unit of the samples."""
    values = np.asarray(samples, dtype=np.float64)
    p50, p90, p95, p99 = (float(value) for value in np.percentile(values, (50, 90, 95, 99)))
    return {"count": int(values.size), "p50": p50, "p90": p90, "p95": p95, "p99": p99}


def judge(
    samples: Sequence[float | None], asked: int, *, is_cut: bool = False, less_is_better: bool = False
) -> Verdict:
    """Judge one figure's capture: `asked` processes were to give a positive sample each, in the order they ran.

    `is_cut` says that a process did less work than it was asked for, so that the figure is that of other work.
    `less_is_better`: the samples are times, not speeds.
    """
    if not samples or any(sample is None or not np.isfinite(sample) or sample <= 0 for sample in samples):
        return Verdict.DEAD
    if is_cut or len(samples) < max(asked, LEAST_SAMPLES):
        return Verdict.SHORT
    present = [sample for sample in samples if sample is not None]
    if _is_throttling([1 / sample for sample in present] if less_is_better else present):
        return Verdict.HOT
    return Verdict.NOISY if summarize(present).spread > NOISY_SPREAD else Verdict.STABLE


def _is_throttling(speeds: Sequence[float]) -> bool:
    """Whether a device got slower with every process, and by more than it differs otherwise."""
    falls = all(later < earlier for earlier, later in itertools.pairwise(speeds))
    return len(speeds) >= LEAST_SAMPLES + 1 and falls and speeds[-1] < speeds[0] * (1 - HOT_FALL)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the worst of some verdicts; `stable` for none."""
    return max(verdicts, key=_ORDER.index, default=Verdict.STABLE)
