"""Difference: what two measurements say of each other, in the words that their samples bear. Pure; no I/O.

Owns which measurements may be held against each other, the interval of their ratio, and the words `faster`, `slower`,
`no difference` and `unclear`. `service.comparison` is another thing: the artifacts of one job beside each other, by
single figures. Called by `service.ledger.history`, and by `benchmarks/calibration.py`, which shows how often the words
are wrong. docs/decisions/0028-trust.md says why this interval and these bars.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from service.errors import NotComparable

Document = dict[str, Any]
Better = Literal["higher", "lower"]

CONFIDENCE = 0.95
#: Two captures of the same artifact on the same phone differ by so much and more for nothing: another hour, another
#: place of the process in memory. `faster` and `slower` must lie beyond it as a whole.
LEAST_CHANGE = 0.02
#: `no difference` must lie within it as a whole.
SAME_WITHIN = 0.05
#: Metrics of one sample a process -> which are better. Graphs have `latency_ms.<signature>` beside them.
SPEEDS: Mapping[str, Better] = {
    "prefill_tokens_per_s": "higher",
    "decode_tokens_per_s": "higher",
    "ttft_s": "lower",
    "init_s": "lower",
}
LATENCY = "latency_ms"
#: Metrics that are one reading each: the peak.
MEMORY = ("peak_rss_bytes", "peak_anon_bytes", "peak_pss_bytes")
#: What two measurements must share, and how the sentence calls it.
_WORKLOAD = {
    "format": "format",
    "prefill_tokens": "number of prefill tokens",
    "decode_tokens": "number of decode tokens",
}
#: Fewer samples than this have no interval.
_LEAST_SAMPLES = 3


@dataclass(frozen=True)
class Change:
    """What became of one metric from the baseline to the candidate."""

    metric: str
    baseline: float
    candidate: float
    #: Candidate over baseline, in the metric's own direction.
    ratio: float
    #: Bounds of the ratio, with CONFIDENCE; None where a metric is one reading.
    interval: tuple[float, float] | None
    #: `faster`, `slower`, `no difference`, `unclear`; of memory `larger`, `smaller`, `no difference`.
    verdict: str

    def to_json(self) -> Document:
        """Return the wire form."""
        interval = None if self.interval is None else list(self.interval)
        return {**self.__dict__, "interval": interval}


def find_changes(baseline: Mapping[str, Any], candidate: Mapping[str, Any]) -> list[Change]:
    """Return what became of every metric that both measurements have; raises `NotComparable`, with the reason.

    Both are figures of a measurement, as a job and its document hold them.
    """
    require_comparable(baseline, candidate)
    is_paired = are_paired(baseline, candidate)
    changes = [
        _find_change(name, better, one, other, is_paired=is_paired)
        for name, better, one, other in _find_sampled(baseline, candidate)
    ]
    return changes + [
        _find_memory_change(name, baseline[name], candidate[name])
        for name in MEMORY
        if baseline.get(name) and candidate.get(name)
    ]


def require_comparable(baseline: Mapping[str, Any], candidate: Mapping[str, Any]) -> None:
    """Raise `NotComparable` unless both are stable, of one kind of device, and of the same work."""
    for role, found in (("baseline", baseline), ("candidate", candidate)):
        if found.get("verdict") != "stable":
            raise NotComparable(
                f"The {role} is {found.get('verdict')}, not stable: its figures stand for nothing. Measure it again.",
                role=role,
                verdict=found.get("verdict"),
            )
    kinds = [(found.get("device") or {}).get("kind") for found in (baseline, candidate)]
    if kinds[0] != kinds[1]:
        raise NotComparable(
            f"The baseline was measured on a {kinds[0]} and the candidate on a {kinds[1]}: what phones, virtual phones "
            "and hosts have measured is never mixed.",
            kinds=kinds,
        )
    for name, words in _WORKLOAD.items():
        if baseline.get(name) != candidate.get(name):
            raise NotComparable(
                f"The {words} differs: {baseline.get(name)} and {candidate.get(name)}. Only the same work is compared.",
                figure=name,
            )


def are_paired(baseline: Mapping[str, Any], candidate: Mapping[str, Any]) -> bool:
    """Whether the processes of both ran in turns, so that what disturbed a round disturbed both."""
    own, other = baseline.get("interleaved"), candidate.get("interleaved")
    return bool(own) and own == other


def find_metrics(figures: Mapping[str, Any]) -> dict[str, tuple[Better, Mapping[str, Any]]]:
    """Return metric -> which are better, and its summary with `samples`, for all that has some."""
    found: dict[str, tuple[Better, Mapping[str, Any]]] = {
        name: (better, figures[name])
        for name, better in SPEEDS.items()
        if isinstance(figures.get(name), Mapping) and figures[name].get("samples")
    }
    for signature, summary in (figures.get(LATENCY) or {}).items():
        if summary.get("samples"):
            found[f"{LATENCY}.{signature}"] = ("lower", summary)
    return found


def _find_sampled(
    baseline: Mapping[str, Any], candidate: Mapping[str, Any]
) -> Iterator[tuple[str, Better, Mapping[str, Any], Mapping[str, Any]]]:
    others = find_metrics(candidate)
    for name, (better, summary) in find_metrics(baseline).items():
        if name in others:
            yield name, better, summary, others[name][1]


def _find_change(
    metric: str, better: Better, one: Mapping[str, Any], other: Mapping[str, Any], *, is_paired: bool
) -> Change:
    interval = find_ratio_interval(one["samples"], other["samples"], is_paired=is_paired)
    least = 0.0 if is_paired else LEAST_CHANGE
    ratio = _geometric_mean(other["samples"]) / _geometric_mean(one["samples"])
    return Change(metric, one["median"], other["median"], ratio, interval, _say(interval, better, least))


def find_ratio_interval(
    baseline: Sequence[float], candidate: Sequence[float], *, is_paired: bool = False
) -> tuple[float, float] | None:
    """Return the bounds of candidate over baseline that Welch's t-test gives the samples' logarithms, or None.

    Of paired samples, those of the paired test: what a round did to both cancels out.
    """
    if min(len(baseline), len(candidate)) < _LEAST_SAMPLES or (is_paired and len(baseline) != len(candidate)):
        return None
    # Takes a second to import, and only a comparison needs it.
    import numpy as np
    from scipy.stats import ttest_ind, ttest_rel

    one, other = np.log(np.asarray(baseline, np.float64)), np.log(np.asarray(candidate, np.float64))
    if np.ptp(other - one if is_paired else np.concatenate([one - one[0], other - other[0]])) == 0:
        # Every sample alike: there is nothing to be unsure of.
        ratio = float(np.exp(other.mean() - one.mean()))
        return ratio, ratio
    test = ttest_rel(other, one) if is_paired else ttest_ind(other, one, equal_var=False)
    found = test.confidence_interval(CONFIDENCE)
    return float(np.exp(found.low)), float(np.exp(found.high))


def _say(interval: tuple[float, float] | None, better: Better, least: float) -> str:
    """Return the word for the bounds of a ratio; `least` is the change that is none yet."""
    if interval is None:
        return "unclear"
    # As speeds: of times, the inverse.
    low, high = interval if better == "higher" else (1 / interval[1], 1 / interval[0])
    if low > 1 + least:
        return "faster"
    if high < 1 / (1 + least):
        return "slower"
    return "no difference" if low > 1 / (1 + SAME_WITHIN) and high < 1 + SAME_WITHIN else "unclear"


def _find_memory_change(metric: str, baseline: float, candidate: float) -> Change:
    """A peak is one reading, and nearly the same each time: the bar alone decides."""
    ratio = candidate / baseline
    verdict = "larger" if ratio > 1 + SAME_WITHIN else "smaller" if ratio < 1 / (1 + SAME_WITHIN) else "no difference"
    return Change(metric, baseline, candidate, ratio, None, verdict)


def _geometric_mean(samples: Sequence[float]) -> float:
    return math.exp(math.fsum(math.log(sample) for sample in samples) / len(samples))


#: What two measurements may differ in -> fields of their entries in the history.
_DIFFERENCES = {
    "model": ("model",),
    "variant": ("variant",),
    "device": ("device_id",),
    "tool": ("tool",),
    "backend": ("backend", "ran_on"),
    "threads": ("threads",),
    "date": ("measured_at",),
}


def describe_difference(
    baseline: tuple[Document, Mapping[str, Any]], candidate: tuple[Document, Mapping[str, Any]]
) -> Document:
    """Return the answer to a comparison of two measurements, each an entry of the history and its figures."""
    (one, one_figures), (other, other_figures) = baseline, candidate
    return {
        "baseline": one,
        "candidate": other,
        "differs": [
            what for what, fields in _DIFFERENCES.items() if any(one.get(name) != other.get(name) for name in fields)
        ],
        "is_paired": are_paired(one_figures, other_figures),
        "changes": [change.to_json() for change in find_changes(one_figures, other_figures)],
    }


def find_regressions(
    baseline: tuple[Document, Mapping[str, Any]], figures: Mapping[str, Any], least_share: float
) -> list[Document]:
    """Return what is slower, or larger in memory, by more than `least_share` than in an earlier measurement.

    Time to load is left out: no verdict is made of it. Never raises `NotComparable`: then there is none.
    """
    entry, earlier = baseline
    try:
        changes = find_changes(earlier, figures)
    except NotComparable:
        return []
    return [
        {"baseline_id": entry["id"], "baseline_job_id": entry["job_id"], "baseline_at": entry["measured_at"]}
        | change.to_json()
        for change in changes
        if change.metric != "init_s" and _get_loss(change) > least_share
    ]


def _get_loss(change: Change) -> float:
    """Return the share of speed that is lost, or of memory that is added; 0 where the data do not say so."""
    if change.verdict == "larger":
        return change.ratio - 1
    if change.verdict != "slower":
        return 0.0
    return 1 - min(change.ratio, 1 / change.ratio)
