"""Comparison: a job's artifacts beside each other, and which ones no other beats. Pure; no I/O.

Owns what an artifact is compared by, and who dominates whom. A figure that nobody measured is never filled in. Called
by `service.choice`, `service.api.choice` and `service.commands` on what `service.ledger.candidates` reads.
docs/decisions/0012-choice.md says why these axes and this order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.gates import GATES, Bound, find_figure
from service.units import format_bytes

Document = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One artifact of a job, published or not: a variant in a format."""

    variant: str
    engine: str
    recipe: str
    format: str
    #: State of the variant.
    state: str
    #: Why the variant was refused or failed.
    error: Mapping[str, Any] | None
    #: The published artifact; None when the variant is not published.
    artifact: Mapping[str, Any] | None
    #: What `gates.merge_figures` makes of its verification, with `benchmark` beside it where it was measured.
    figures: Mapping[str, Any]
    #: Worst verdict on its benchmarks, e.g. `noisy`; None when there is none.
    measurement: str | None = None

    def to_json(self) -> Document:
        """Return the wire form; a figure that is missing is null."""
        return {
            "variant": self.variant,
            "engine": self.engine,
            "recipe": self.recipe,
            "format": self.format,
            "state": self.state,
            "error": self.error,
            "artifact": self.artifact,
            "figures": {name: find_figure(self.figures, name) for name in FIGURES},
            "measurement": self.measurement,
        }


@dataclass(frozen=True)
class Axis:
    """One direction in which an artifact can be better than another."""

    name: str
    figure_name: str
    bound: Bound
    #: What the best one has, e.g. `the lowest KL divergence`.
    best: str
    #: Prints a figure with its unit.
    say: Callable[[float], str]

    @property
    def better(self) -> str:
        """Which figures are better: `lower` or `higher`."""
        return "lower" if self.bound == "at_most" else "higher"

    def find(self, candidate: Candidate) -> float | None:
        """Return the candidate's figure, or None."""
        return find_figure(candidate.figures, self.figure_name)

    def cost(self, candidate: Candidate) -> float:
        """Return what is lower for the better candidate; infinite where the figure is missing."""
        figure = self.find(candidate)
        return math.inf if figure is None else _cost(self.figure_name, self.bound, figure)


#: KL divergence, in nats, at and below which artifacts count as equally good: a float graph's own rounding.
ROUNDING_KL = 1e-6
_FLOORS = {"parity.kl_mean": ROUNDING_KL}


def _cost(figure_name: str, bound: Bound, figure: float) -> float:
    return max(figure, _FLOORS.get(figure_name, -math.inf)) if bound == "at_most" else -figure


#: In the order that breaks ties.
AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis(
            "quality",
            "parity.kl_mean",
            "at_most",
            "the lowest KL divergence",
            lambda kl: f"{kl:.2g} nats",
        ),
        Axis("size", "size_bytes", "at_most", "the smallest file", format_bytes),
        Axis(
            "speed",
            "benchmark.decode_tokens_per_s",
            "at_least",
            "the fastest decode",
            lambda speed: f"{speed:,.0f} tokens/s",
        ),
        Axis("memory", "benchmark.peak_anon_bytes", "at_most", "the lowest peak memory", format_bytes),
    )
}
#: Figures that are shown: all that can be bounded, and what the source achieves. Name -> which are better.
FIGURES: dict[str, Bound | None] = {
    **{gate.figure_name: gate.bound for gate in GATES.values()},
    "quality.source_exact_match": None,
}
#: A job that made several formats is asked for the first of these unless the asker names one.
FORMAT_ORDER = ("litertlm", "task", "tflite")


@dataclass(frozen=True)
class Front:
    """The artifacts of one format, compared. Only published ones dominate, are dominated, or are best at anything."""

    format: str
    candidates: tuple[Candidate, ...]
    #: Axes on which every published artifact has a figure.
    axes: tuple[Axis, ...]
    #: Axis -> published variants without its figure; such an axis is not compared.
    missing: Mapping[str, tuple[str, ...]]
    #: Variant -> variants that are at least as good on every axis and better on one.
    dominated_by: Mapping[str, tuple[str, ...]]
    #: Figure -> published variants that have the best one, where figures differ.
    best: Mapping[str, tuple[str, ...]]

    def to_json(self) -> Document:
        """Return the wire form."""
        return {
            "format": self.format,
            "axes": [axis.name for axis in self.axes],
            "missing": {name: list(variants) for name, variants in self.missing.items()},
            "best": {name: list(variants) for name, variants in self.best.items()},
            "candidates": [
                {
                    **candidate.to_json(),
                    "is_pareto": None if candidate.artifact is None else not self.dominated_by[candidate.variant],
                    "dominated_by": list(self.dominated_by.get(candidate.variant, ())),
                }
                for candidate in self.candidates
            ],
        }


def compare(candidates: Iterable[Candidate]) -> list[Front]:
    """Compare artifacts within each format: nobody chooses between a bare graph and a bundle by size."""
    candidates = list(candidates)
    formats = [name for name in FORMAT_ORDER if any(each.format == name for each in candidates)]
    return [_compare_format(name, [each for each in candidates if each.format == name]) for name in formats]


def _compare_format(name: str, candidates: Sequence[Candidate]) -> Front:
    published = [each for each in candidates if each.artifact is not None]
    axes = find_common_axes(published)
    return Front(
        name,
        tuple(candidates),
        axes,
        {
            axis.name: tuple(each.variant for each in published if axis.find(each) is None)
            for axis in AXES.values()
            if published and axis not in axes
        },
        {
            each.variant: tuple(other.variant for other in published if dominates(other, each, axes))
            for each in published
        },
        {figure: best for figure, bound in FIGURES.items() if bound and (best := _find_best(figure, bound, published))},
    )


def find_common_axes(candidates: Iterable[Candidate]) -> tuple[Axis, ...]:
    """Return the axes on which every candidate has a figure: domination holds between any two only on such."""
    candidates = list(candidates)
    return tuple(axis for axis in AXES.values() if all(axis.find(each) is not None for each in candidates))


def dominates(one: Candidate, other: Candidate, axes: Sequence[Axis]) -> bool:
    """Return whether `one` is at least as good as `other` on every axis, and better on one."""
    pairs = [(axis.cost(one), axis.cost(other)) for axis in axes]
    return all(own <= others for own, others in pairs) and any(own < others for own, others in pairs)


def _find_best(name: str, bound: Bound, candidates: Sequence[Candidate]) -> tuple[str, ...]:
    costs = {
        each.variant: _cost(name, bound, figure)
        for each in candidates
        if (figure := find_figure(each.figures, name)) is not None
    }
    least = min(costs.values(), default=math.inf)
    return tuple(variant for variant, cost in costs.items() if cost == least) if len(set(costs.values())) > 1 else ()


def describe_comparison(job: Mapping[str, Any], candidates: Iterable[Candidate]) -> Document:
    """Return the answer to a comparison; `job` is its summary."""
    return {
        **describe_job(job),
        "axes": {axis.name: {"figure_name": axis.figure_name, "better": axis.better} for axis in AXES.values()},
        "formats": [front.to_json() for front in compare(candidates)],
    }


def describe_job(job: Mapping[str, Any]) -> Document:
    """Return what an answer says of the job itself."""
    return {"job_id": job["id"], "state": job["state"], "is_final": job["is_final"]}
