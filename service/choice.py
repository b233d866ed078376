"""Choice: which artifact of a job to take, within bounds, and why. Pure; no I/O.

Owns the selection. A bound is a gate of `service.gates` with a threshold of the asker's; a figure that nobody measured
keeps none. Called by `service.api.choice` and `service.commands.choice` on what `service.ledger.candidates` reads.
docs/decisions/0012-choice.md says why this order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.comparison import AXES, FORMAT_ORDER, Axis, Candidate, Document, describe_job, find_common_axes
from service.errors import InvalidRequest
from service.gates import GATES, Verdict, judge_gate
from service.recipes import ENGINES, FORMATS, require_known

DEFAULT_PREFERENCE = "quality"


@dataclass(frozen=True)
class Wish:
    """What somebody wants of an artifact. Raises `UnknownName` for names that do not exist."""

    #: Gate -> threshold.
    bounds: Mapping[str, float] = field(default_factory=dict)
    #: The axis that decides among those that fit.
    prefer: str = DEFAULT_PREFERENCE
    format: str | None = None
    engine: str | None = None

    def __post_init__(self) -> None:
        for name, threshold in self.bounds.items():
            require_known("gate", name, GATES)
            if not math.isfinite(threshold):
                raise InvalidRequest(f"{name}: the threshold must be a finite number, not {threshold}.")
        require_known("preference", self.prefer, AXES)
        if self.format is not None:
            require_known("format", self.format, FORMATS)
        if self.engine is not None:
            require_known("engine", self.engine, [name for name in ENGINES if name != "auto"])


@dataclass(frozen=True)
class Judged:
    """A candidate, held against a wish."""

    candidate: Candidate
    verdicts: tuple[Verdict, ...]
    #: Sentences; none when it fits.
    objections: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether it can be picked."""
        return not self.objections

    def to_json(self) -> Document:
        """Return the wire form."""
        return {
            **self.candidate.to_json(),
            "constraints": [verdict.to_json() for verdict in self.verdicts],
            "objections": list(self.objections),
        }


@dataclass(frozen=True)
class Pick:
    """The answer to a wish."""

    wish: Wish
    format: str
    #: Those that fit, the best first.
    ranked: tuple[Judged, ...]
    excluded: tuple[Judged, ...]
    #: Why the first one wins, or why none does. A sentence or two.
    reason: str
    #: When none fits: the published artifact that misses least.
    nearest: Judged | None

    @property
    def picked(self) -> Judged | None:
        """The best that fits; None when none does."""
        return self.ranked[0] if self.ranked else None

    def to_json(self) -> Document:
        """Return the wire form."""
        return {
            "format": self.format,
            "engine": self.wish.engine,
            "prefer": self.wish.prefer,
            "bounds": dict(self.wish.bounds),
            "picked": self.picked.to_json() if self.picked else None,
            "reason": self.reason,
            "also_fit": [judged.to_json() for judged in self.ranked[1:]],
            "excluded": [judged.to_json() for judged in self.excluded],
            "nearest": self.nearest.to_json() if self.nearest else None,
        }


def pick(candidates: Iterable[Candidate], wish: Wish) -> Pick:
    """Return the best published artifact that keeps every bound, and why.

    The preferred axis decides, then the others in the order of `AXES`, as far as all that fit have a figure, then
    the order of the request: what wins is dominated by nothing that fits. Raises `InvalidRequest` for a format that
    the job does not make.
    """
    candidates = list(candidates)
    made = [name for name in FORMAT_ORDER if any(each.format == name for each in candidates)]
    if wish.format is not None and wish.format not in made:
        raise InvalidRequest(f"The job makes {', '.join(made) or 'nothing yet'}; not {wish.format}.", formats=made)
    chosen_format = wish.format or (made[0] if made else FORMATS[-1])
    judged = [_judge(each, wish) for each in candidates if each.format == chosen_format]
    fitting = [each for each in judged if each.fits]
    preferred = AXES[wish.prefer]
    common = find_common_axes(each.candidate for each in fitting)
    order = (preferred, *(axis for axis in common if axis != preferred))
    # Sorting keeps the order of the request between equals.
    ranked = sorted(fitting, key=lambda each: [axis.cost(each.candidate) for axis in order])
    published = [each for each in judged if each.candidate.artifact is not None]
    nearest = None if ranked else min(published, key=_distance, default=None)
    reason = _explain(ranked, order) if ranked else _explain_none(judged, nearest, chosen_format)
    excluded = tuple(each for each in judged if not each.fits)
    return Pick(wish, chosen_format, tuple(ranked), excluded, reason, nearest)


def _judge(candidate: Candidate, wish: Wish) -> Judged:
    verdicts = tuple(judge_gate(GATES[name], limit, candidate.figures) for name, limit in sorted(wish.bounds.items()))
    objections = []
    if candidate.artifact is None:
        said = f": {candidate.error['message']}" if candidate.error else "."
        objections.append(f"It is {candidate.state}, not published{said}")
    if wish.engine is not None and candidate.engine != wish.engine:
        objections.append(f"Its engine is {candidate.engine}, not {wish.engine}.")
    objections += [verdict.sentence for verdict in verdicts if not verdict.passed]
    preferred = AXES[wish.prefer]
    if preferred.find(candidate) is None:
        objections.append(f"Its {preferred.name} ({preferred.figure_name}) was not measured, and is what decides.")
    return Judged(candidate, verdicts, tuple(objections))


def _distance(judged: Judged) -> tuple[int, float]:
    """How far a candidate is from fitting: number of objections, then the largest miss as a share of the larger."""
    missed = [verdict for verdict in judged.verdicts if not verdict.passed]
    shares = [
        math.inf
        if verdict.figure is None
        else abs(verdict.figure - verdict.threshold) / max(abs(verdict.figure), abs(verdict.threshold))
        for verdict in missed
    ]
    return len(judged.objections), max(shares, default=math.inf)


def _explain(ranked: Sequence[Judged], order: Sequence[Axis]) -> str:
    """Say by which axis the first beats the second."""
    first = ranked[0].candidate
    if len(ranked) == 1:
        return f"{first.variant!r} is the only one that fits."
    second = ranked[1].candidate
    fit = f"Of {len(ranked)} that fit,"
    decisive = next((axis for axis in order if axis.cost(first) != axis.cost(second)), None)
    if decisive is None:
        return f"{fit} {first.variant!r} and {second.variant!r} are equal; the job names {first.variant!r} first."
    own, others = (decisive.say(decisive.find(each) or 0.0) for each in (first, second))
    ties = [axis.name for axis in order[: order.index(decisive)]]
    if not ties:
        return f"{fit} {first.variant!r} has {decisive.best}: {own}; next is {second.variant!r} with {others}."
    pair = f"{first.variant!r} and {second.variant!r} are the best and equal in {' and '.join(ties)}"
    return f"{fit} {pair}; {decisive.name} decides: {own} against {others}."


def _explain_none(judged: Sequence[Judged], nearest: Judged | None, chosen_format: str) -> str:
    if nearest is None:
        return f"The job has published no {chosen_format} (yet): {len(judged)} variants, none to pick."
    return f"None fits. The nearest is {nearest.candidate.variant!r}: {' '.join(nearest.objections)}"


def describe_pick(job: Mapping[str, Any], candidates: Iterable[Candidate], wish: Wish) -> Document:
    """Return the answer to a wish; `job` is its summary."""
    return {**describe_job(job), **pick(candidates, wish).to_json()}
