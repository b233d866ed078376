"""From samples to a figure that can be trusted, or a word that says why not. Pure.

Owns median, p90, MAD and the verdict on a capture. A sample is one fresh process: the spread inside a process is
small, between processes it is large. Called by every device of `workers.devices`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import numpy as np

#: Below this many processes a median says little.
LEAST_SAMPLES = 3
#: How sure an interval is to hold the median that no end of processes would have.
CONFIDENCE = 0.95
#: From these on an interval of that confidence exists at all: with five, even the whole range holds it in 94 of 100.
LEAST_FOR_INTERVAL = 6
#: A level that falls by more than this share while a capture runs looks like throttling (decision 28).
HOT_FALL = 0.08
#: So much of the samples' variance must be that fall: what is left is noise about it.
HOT_SHARE = 0.6
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
    low, high = _find_interval_ranks(len(values))
    ordered = np.sort(values)
    return float(ordered[low]), float(ordered[high])


@cache
def _find_interval_ranks(count: int) -> tuple[int, int]:
    """Return which of `count` ordered samples are the bounds: it hangs on nothing but their number."""
    # Takes a second to import, and only a finished capture needs it.
    from scipy.stats import quantile_test

    found = quantile_test(np.arange(count), p=0.5).confidence_interval(CONFIDENCE)
    return int(found.low), int(found.high)


def percentiles(samples: Sequence[float]) -> dict[str, float | int]:
    """Return count, p50, p90, p95, p99 of all iterations of all processes, in the unit of the samples."""
    values = np.asarray(samples, dtype=np.float64)
    p50, p90, p95, p99 = (float(value) for value in np.percentile(values, (50, 90, 95, 99)))
    return {"count": int(values.size), "p50": p50, "p90": p90, "p95": p95, "p99": p99}


def judge(
    samples: Sequence[float | None],
    asked: int,
    *,
    is_cut: bool = False,
    less_is_better: bool = False,
    earlier: Sequence[float] = (),
) -> Verdict:
    """Judge one figure's capture: `asked` processes were to give a positive sample each, in the order they ran.

    `is_cut` says that a process did less work than it was asked for, so that the figure is that of other work.
    `less_is_better`: the samples are times, not speeds. `earlier` are the samples of the capture before it, of which
    this one is the repetition: a phone that has not come back to its old level is still held down.
    """
    if not samples or any(sample is None or not np.isfinite(sample) or sample <= 0 for sample in samples):
        return Verdict.DEAD
    if is_cut or len(samples) < max(asked, LEAST_SAMPLES):
        return Verdict.SHORT
    present = [sample for sample in samples if sample is not None]
    series = [present, [*earlier, *present]] if earlier else [present]
    if any(_is_throttling(each, less_is_better=less_is_better) for each in series):
        return Verdict.HOT
    return Verdict.NOISY if summarize(present).spread > NOISY_SPREAD else Verdict.STABLE


def _is_throttling(samples: Sequence[float], *, less_is_better: bool) -> bool:
    """Whether a level that only falls explains the samples, and falls far.

    Steps, slopes and stairs are all of them levels that only fall; one noisy sample on the way hides none of them.
    """
    if len(samples) <= LEAST_SAMPLES:
        return False
    from scipy.optimize import isotonic_regression

    speeds = np.log(np.asarray(samples)) * (-1 if less_is_better else 1)
    level = isotonic_regression(speeds, increasing=False).x
    fall = 1 - np.exp(level[-1] - level[0])
    return bool(fall > HOT_FALL and np.var(speeds - level) < (1 - HOT_SHARE) * np.var(speeds))


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the worst of some verdicts; `stable` for none."""
    return max(verdicts, key=_ORDER.index, default=Verdict.STABLE)
