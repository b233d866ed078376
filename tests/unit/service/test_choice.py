"""Choice on figures of our own making: what is picked keeps its bounds and is beaten by nothing that does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import choice
from service.choice import Wish
from service.comparison import AXES, Candidate, compare, dominates, find_common_axes
from service.errors import InvalidRequest, UnknownName
from service.gates import GATES, find_figure

#: The same examples each time, however slow the machine.
STEADY = settings(deadline=None, derandomize=True, database=None)
#: Few values, so that ties, domination and rounding are common.
COARSE = st.sampled_from([None, 1e-12, 2e-12, 0.01, 0.02, 1.0, 2.0])
BOUNDED = ("max_kl", "max_size_bytes", "min_decode_tokens_per_s", "max_peak_anon_bytes", "min_exact_match")


def make(variant: str = "v", published: bool = True, format: str = "litertlm", **figures: float | None) -> Candidate:
    sections: dict[str, Any] = {"parity": {}, "quality": {}, "benchmark": {}}
    names = {
        "kl": ("parity", "kl_mean"),
        "top1": ("parity", "top1_agreement"),
        "exact": ("quality", "exact_match"),
        "speed": ("benchmark", "decode_tokens_per_s"),
        "memory": ("benchmark", "peak_anon_bytes"),
    }
    for name, (section, leaf) in names.items():
        if figures.get(name) is not None:
            sections[section][leaf] = figures[name]
    error = {"code": "gate_refused", "message": "The KL divergence is too large.", "retryable": False, "details": {}}
    return Candidate(
        variant=variant,
        engine="reauthored",
        recipe=variant,
        format=format,
        state="succeeded" if published else "refused",
        error=None if published else error,
        artifact={"name": f"tiny-{variant}.{format}"} if published else None,
        figures={**sections, "size_bytes": figures.get("size")},
    )


FIGURES = st.fixed_dictionaries(dict.fromkeys(("kl", "size", "speed", "memory", "exact"), COARSE))
CANDIDATES = st.lists(st.tuples(FIGURES, st.booleans(), st.sampled_from(["litertlm", "tflite"])), max_size=7).map(
    lambda rows: [make(f"v{n}", published, kind, **figures) for n, (figures, published, kind) in enumerate(rows)]
)
WISHES = st.builds(
    Wish,
    bounds=st.dictionaries(st.sampled_from(BOUNDED), st.sampled_from([1e-3, 0.01, 0.5, 1.0, 1.5]), max_size=3),
    prefer=st.sampled_from(list(AXES)),
)


def keeps(candidate: Candidate, name: str, threshold: float) -> bool:
    """Judged anew, without the code under test."""
    figure = find_figure(candidate.figures, GATES[name].figure_name)
    return figure is not None and (figure >= threshold if name.startswith("min_") else figure <= threshold)


@STEADY
@given(CANDIDATES, WISHES)
def test_what_is_picked_fits_and_is_beaten_by_nothing_that_fits(candidates: list[Candidate], wish: Wish) -> None:
    answer = choice.pick(candidates, wish)
    fitting = [
        each
        for each in candidates
        if each.artifact is not None
        and each.format == answer.format
        and AXES[wish.prefer].find(each) is not None
        and all(keeps(each, *bound) for bound in wish.bounds.items())
    ]
    assert [judged.candidate for judged in answer.ranked] == sorted(
        fitting, key=[judged.candidate for judged in answer.ranked].index
    )
    assert len(answer.ranked) + len(answer.excluded) == sum(each.format == answer.format for each in candidates)
    assert all(judged.objections for judged in answer.excluded)
    if answer.picked is None:
        return
    chosen = answer.picked.candidate
    axes = find_common_axes(fitting)
    assert AXES[wish.prefer] in axes
    for other in fitting:
        assert AXES[wish.prefer].cost(chosen) <= AXES[wish.prefer].cost(other)
        assert not dominates(other, chosen, axes)
        # Control: domination is not blind.
        assert not all(axis.cost(other) < axis.cost(chosen) for axis in axes)


@STEADY
@given(CANDIDATES, WISHES)
def test_the_answer_does_not_depend_on_those_that_are_no_candidates(candidates: list[Candidate], wish: Wish) -> None:
    answer = choice.pick(candidates, wish)
    published = [each for each in candidates if each.artifact is not None and each.format == answer.format]
    again = choice.pick(published, wish)
    assert [judged.candidate for judged in again.ranked] == [judged.candidate for judged in answer.ranked]


@STEADY
@given(CANDIDATES)
def test_a_front_is_what_nothing_dominates(candidates: list[Candidate]) -> None:
    fronts = compare(candidates)
    assert sum(len(front.candidates) for front in fronts) == len(candidates)
    for front in fronts:
        published = [each for each in front.candidates if each.artifact is not None]
        assert set(front.dominated_by) == {each.variant for each in published}
        best = [each for each in published if not front.dominated_by[each.variant]]
        assert bool(best) == bool(published)
        for each in published:
            for axis in front.axes:
                assert axis.find(each) is not None
            # Whoever is dominated is dominated by someone of the front.
            beaten_by = set(front.dominated_by[each.variant])
            assert not beaten_by or beaten_by & {other.variant for other in best}
        for variants in front.best.values():
            assert set(variants) < {each.variant for each in published}


def names(judged: Sequence[choice.Judged]) -> list[str]:
    return [each.candidate.variant for each in judged]


THREE = [
    make("large", kl=1e-12, size=5e6, speed=100, memory=9e6, top1=1.0, exact=1.0),
    make("middle", kl=0.001, size=2e6, speed=300, memory=5e6, top1=0.99, exact=1.0),
    make("small", kl=0.03, size=1e6, speed=200, memory=6e6, top1=0.96, exact=0.9),
]


@pytest.mark.parametrize(
    ("prefer", "ranked"),
    [
        ("quality", ["large", "middle", "small"]),
        ("size", ["small", "middle", "large"]),
        ("speed", ["middle", "small", "large"]),
        ("memory", ["middle", "small", "large"]),
    ],
)
def test_the_preferred_axis_decides(prefer: str, ranked: list[str]) -> None:
    assert names(choice.pick(THREE, Wish(prefer=prefer)).ranked) == ranked


def test_the_answer_says_why_and_what_excluded_the_others() -> None:
    answer = choice.pick([*THREE, make("refused", published=False)], Wish({"max_size_bytes": 2.5e6, "min_top1": 0.95}))
    assert names(answer.ranked) == ["middle", "small"]
    assert answer.reason == (
        "Of 2 that fit, 'middle' has the lowest KL divergence: 0.001 nats; next is 'small' with 0.03 nats."
    )
    assert answer.picked is not None
    assert [(v.gate, v.figure, v.threshold, v.passed) for v in answer.picked.verdicts] == [
        ("max_size_bytes", 2e6, 2.5e6, True),
        ("min_top1", 0.99, 0.95, True),
    ]
    excluded = {judged.candidate.variant: " ".join(judged.objections) for judged in answer.excluded}
    assert set(excluded) == {"large", "refused"}
    assert "5,000,000; the gate max_size_bytes asks for at most 2,500,000" in excluded["large"]
    assert excluded["refused"].startswith("It is refused, not published: The KL divergence is too large.")


def test_rounding_is_no_quality() -> None:
    """A float graph that is a hair nearer to its source does not beat one of half the size."""
    pair = [make("none", kl=2.64e-12, size=5e6), make("float16", kl=2.66e-12, size=2.7e6)]
    answer = choice.pick(pair, Wish())
    assert names(answer.ranked) == ["float16", "none"]
    assert "equal in quality; size decides: 2.7 MB against 5.0 MB" in answer.reason
    (front,) = compare(pair)
    assert front.dominated_by == {"none": ("float16",), "float16": ()}
    assert front.best == {"size_bytes": ("float16",)}


def test_equals_stand_in_the_order_of_the_request() -> None:
    pair = [make("first", kl=0.1, size=1.0), make("second", kl=0.1, size=1.0)]
    answer = choice.pick(pair, Wish(prefer="size"))
    assert names(answer.ranked) == ["first", "second"]
    assert "are equal; the job names 'first' first" in answer.reason


def test_a_missing_figure_keeps_no_bound_and_is_said() -> None:
    candidates = [make("measured", kl=0.1, size=2.0, speed=1.0), make("unmeasured", kl=0.0, size=1.0)]
    (front,) = compare(candidates)
    assert [axis.name for axis in front.axes] == ["quality", "size"]
    assert front.missing == {"speed": ("unmeasured",), "memory": ("measured", "unmeasured")}
    assert front.dominated_by["measured"] == ("unmeasured",)
    bounded = choice.pick(candidates, Wish({"min_decode_tokens_per_s": 0.5}))
    assert names(bounded.ranked) == ["measured"]
    assert "was not measured" in bounded.excluded[0].objections[0]
    preferred = choice.pick(candidates, Wish(prefer="speed"))
    assert names(preferred.ranked) == ["measured"]
    assert choice.pick(candidates, Wish(prefer="memory")).picked is None


def test_the_nearest_misses_fewest_bounds_and_then_by_the_smallest_share() -> None:
    wish = {"max_size_bytes": 0.9e6, "min_exact_match": 0.99}
    nearest = choice.pick(THREE, Wish(wish)).nearest
    assert nearest is not None
    # `large` and `middle` miss the size alone; `small` misses both, though its size by less.
    assert nearest.candidate.variant == "middle"
    assert choice.pick([make("r", published=False)], Wish()).nearest is None


def test_formats_are_compared_apart_and_bundles_come_first() -> None:
    candidates = [make("a", format="tflite", kl=0.0, size=1.0), make("a", kl=0.0, size=9.0)]
    assert [front.format for front in compare(candidates)] == ["litertlm", "tflite"]
    picked = choice.pick(candidates, Wish(prefer="size")).picked
    assert picked is not None
    assert picked.candidate.format == "litertlm"
    named = choice.pick(candidates, Wish(format="tflite")).picked
    assert named is not None
    assert named.candidate.format == "tflite"
    with pytest.raises(InvalidRequest, match="makes litertlm, tflite; not task"):
        choice.pick(candidates, Wish(format="task"))


def test_another_engine_is_excluded() -> None:
    answer = choice.pick([make(kl=0.0)], Wish(engine="traced"))
    assert answer.excluded[0].objections == ("Its engine is reauthored, not traced.",)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"bounds": {"max_sise_bytes": 1.0}}, UnknownName, "max_size_bytes"),
        ({"bounds": {"max_kl": math.nan}}, InvalidRequest, "finite"),
        ({"prefer": "sped"}, UnknownName, "speed"),
        ({"format": "litertml"}, UnknownName, "litertlm"),
        ({"engine": "auto"}, UnknownName, "traced"),
    ],
)
def test_a_wish_that_means_nothing_is_refused(fields: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Wish(**fields)
