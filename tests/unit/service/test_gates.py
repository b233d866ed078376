from __future__ import annotations

import copy
from typing import Any

import pytest

from service import gates
from service.errors import UnknownName
from service.recipes import RECIPES

#: What a sound artifact of the given class measures, in all three formats.
FLOAT: dict[str, Any] = {
    "formats": ["litertlm", "task", "tflite"],
    "size_bytes": 5_000_000,
    "parity": {
        "max_abs_error": 1e-5,
        "max_abs_error_ratio": 1e-6,
        "top1_agreement": 1.0,
        "top1_agreement_confident": 1.0,
        "top1_agreement_sure": 1.0,
        "sure_positions": 90,
        "confident_share": 1.0,
        "kl_mean": 1e-12,
        "kl_max": 1e-11,
    },
    "quality": {
        "perplexity": 8.0,
        "text_perplexity": 9.0,
        "perplexity_increase": 0.0,
        "exact_match": 0.99,
        "source_exact_match": 0.99,
        "exact_match_drop": 0.0,
    },
    "generation": {"match_ratio": 1.0, "stops_missed": 0},
    "graph_generation": {"match_ratio": 1.0, "stops_missed": 0},
    "stop_tokens": {"missing": 0},
    "tokenizer": {"mismatch_ratio": 0.0},
    "context": {"usable_tokens": 256, "unusable_tokens": 0},
    "graph_scoring": {"max_loss_error": 1e-7, "windows": 1},
    "conversation": {"samples": 6, "match_ratio": 1.0, "misrendered": 0, "misread": 0},
    "conversation_generation": {"match_ratio": 1.0, "stops_missed": 0},
}


def change(figures: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A deep copy with one figure replaced, or removed when `value` is None."""
    changed = copy.deepcopy(figures)
    *sections, leaf = name.split(".")
    target = changed
    for section in sections:
        target = target[section]
    if value is None:
        del target[leaf]
    else:
        target[leaf] = value
    return changed


def dict_of_defaults(recipe: str) -> dict[str, float]:
    return {gate.name: threshold for gate, threshold in gates.select_defaults(recipe, FLOAT)}


def refused(recipe: str, figures: dict[str, Any], user_gates: dict[str, float] | None = None) -> set[str]:
    return {verdict.gate for verdict in gates.judge(recipe, figures, user_gates) if not verdict.passed}


@pytest.mark.parametrize("recipe", RECIPES)
def test_sound_figures_pass_every_default_gate(recipe: str) -> None:
    assert gates.judge(recipe, FLOAT)
    assert refused(recipe, FLOAT) == set()


@pytest.mark.parametrize(
    ("name", "value", "gate"),
    [
        ("parity.max_abs_error_ratio", 1.1e-3, "float_error"),
        ("parity.top1_agreement_confident", 0.99, "confident_top1"),
        ("parity.confident_share", 0.79, "confident_share"),
        ("generation.match_ratio", 0.999, "generation_match"),
        ("generation.stops_missed", 1, "stop_missed"),
        ("stop_tokens.missing", 1, "stop_declared"),
        ("graph_generation.match_ratio", 0.9, "runtime_match"),
        ("graph_generation.stops_missed", 1, "runtime_stops"),
        ("graph_scoring.max_loss_error", 0.02, "runtime_scores"),
        ("conversation.misrendered", 1, "conversation_rendered"),
        ("conversation_generation.stops_missed", 1, "conversation_stops"),
        ("context.unusable_tokens", 1, "usable_context"),
    ],
)
def test_float_artifact_is_refused_by_the_gate_of_the_bad_or_missing_figure(name: str, value: float, gate: str) -> None:
    assert refused("none", change(FLOAT, name, value)) == {gate}
    assert refused("none", change(FLOAT, name, None)) == {gate}


@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if recipe.is_lossy])
@pytest.mark.parametrize(
    ("name", "value", "gate"),
    [
        ("parity.kl_mean", 0.6, "lossy_kl"),
        ("parity.top1_agreement_sure", 0.79, "lossy_top1"),
        ("quality.exact_match_drop", 0.05, "lossy_exact_match_drop"),
        ("stop_tokens.missing", 1, "stop_declared"),
        ("graph_generation.match_ratio", 0.9, "runtime_match"),
        ("context.unusable_tokens", 1, "usable_context"),
    ],
)
def test_lossy_artifact_is_refused_by_the_gate_of_the_bad_or_missing_figure(
    recipe: str, name: str, value: float, gate: str
) -> None:
    assert refused(recipe, change(FLOAT, name, value)) == {gate}
    assert refused(recipe, change(FLOAT, name, None)) == {gate}


def test_every_lossy_recipe_has_limits_and_no_float_recipe_has() -> None:
    assert set(gates.LOSSY_LIMITS) == {name for name, recipe in RECIPES.items() if recipe.is_lossy}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.0", True])
def test_figure_that_is_no_finite_number_counts_as_missing(value: Any) -> None:
    verdicts = {each.gate: each for each in gates.judge("none", change(FLOAT, "parity.max_abs_error_ratio", value))}
    assert not verdicts["float_error"].passed
    assert verdicts["float_error"].figure is None
    assert "not measured" in verdicts["float_error"].sentence


def test_source_that_is_hardly_ever_sure_is_not_asked_for_top1() -> None:
    unsure = change(
        change(FLOAT, "parity.sure_positions", gates.MIN_SURE_POSITIONS - 1), "parity.top1_agreement_sure", None
    )
    assert refused("dynamic_int8", unsure) == set()
    enough = change(unsure, "parity.sure_positions", gates.MIN_SURE_POSITIONS)
    assert refused("dynamic_int8", enough) == {"lossy_top1"}


def test_source_without_evaluation_is_not_asked_for_exact_match() -> None:
    without = change(FLOAT, "quality", {"perplexity": 8.0})
    assert refused("dynamic_int8", without) == set()
    assert refused("dynamic_int8", without, {"max_exact_match_drop": 0.5}) == {"max_exact_match_drop"}


def test_bare_graph_is_not_asked_for_what_only_a_bundle_shows() -> None:
    bare = {**FLOAT, "formats": ["tflite"]}
    for section in (
        *("graph_generation", "stop_tokens", "tokenizer"),
        *("graph_scoring", "conversation", "conversation_generation"),
    ):
        bare.pop(section)
    assert refused("none", bare) == set()
    assert refused("none", {**bare, "formats": ["task", "tflite"]}) == {
        "stop_declared",
        "runtime_match",
        "runtime_stops",
    }


@pytest.mark.parametrize("name", gates.GATES)
def test_user_gate_passes_at_its_threshold_and_refuses_beyond_it_or_without_a_figure(name: str) -> None:
    gate = gates.GATES[name]
    section, _, leaf = gate.figure_name.rpartition(".")
    figures = copy.deepcopy(FLOAT)
    place = figures.setdefault(section, {}) if section else figures
    figure = float(place.setdefault(leaf, 2.0))
    beyond = figure - 0.5 if gate.bound == "at_most" else figure + 0.5
    assert refused("none", figures, {name: figure}) == set()
    verdict = next(each for each in gates.judge("none", figures, {name: beyond}) if each.gate == name)
    assert (verdict.passed, verdict.figure, verdict.threshold) == (False, figure, beyond)
    assert name in refused("none", change(figures, gate.figure_name, None), {name: figure})


@pytest.mark.parametrize("name", gates.OVERRIDABLE)
def test_a_request_sets_the_threshold_of_a_lossy_gate_and_the_verdict_says_so(name: str) -> None:
    gate = gates.OVERRIDABLE[name]
    at_most = gate.bound == "at_most"
    broken = change(FLOAT, gate.figure_name, 0.5)
    assert refused("dynamic_int8", broken) == {name}
    assert refused("dynamic_int8", broken, {name: 0.6 if at_most else 0.4}) == set()
    verdicts = {each.gate: each for each in gates.judge("dynamic_int8", broken, {name: 0.6 if at_most else 0.4})}
    assert verdicts[name].to_json()["overridden"] == dict_of_defaults("dynamic_int8")[name]
    assert [each.gate for each in verdicts.values() if each.overridden is not None] == [name]
    assert refused("dynamic_int8", FLOAT, {name: -1.0 if at_most else 1.1}) == {name}
    assert refused("none", broken, {name: 0.6}) == refused("none", broken)


@pytest.mark.parametrize("name", ["usable_context", "float_error", "stop_declared", "runtime_match", "runtime_scores"])
def test_no_request_sets_a_gate_that_guards_the_truth(name: str) -> None:
    with pytest.raises(UnknownName, match="guards"):
        gates.judge("none", FLOAT, {name: 0.5})


def test_a_source_without_a_template_or_another_tokenizer_is_not_asked_for_what_cannot_be_shown() -> None:
    bare = {name: value for name, value in FLOAT.items() if not name.startswith("conversation")}
    assert refused("none", bare) == set()
    assert refused("none", bare, {"min_conversation_match": 1.0}) == {"min_conversation_match"}
    del bare["graph_scoring"]
    assert refused("none", bare) == set()


def test_unknown_gate_and_recipe_offer_the_nearest_name() -> None:
    with pytest.raises(UnknownName, match="max_kl"):
        gates.judge("none", FLOAT, {"max-kl": 0.1})
    with pytest.raises(UnknownName, match="dynamic_int8"):
        gates.judge("dynamic-int8", FLOAT)


def test_only_gates_on_measurements_need_a_benchmark() -> None:
    needing = {name for name in gates.GATES if gates.needs_benchmark({name: 1.0})}
    assert needing == {"min_prefill_tokens_per_s", "min_decode_tokens_per_s", "max_ttft_s", "max_peak_anon_bytes"}
    assert not gates.needs_benchmark(None)
    assert not gates.needs_benchmark({})


def test_merging_takes_the_worst_figure_of_all_formats() -> None:
    one = {**copy.deepcopy(FLOAT), "format": "tflite", "size_bytes": 10}
    two = {**change(FLOAT, "quality.exact_match", 0.9), "format": "task", "size_bytes": 11}
    two = change(change(two, "quality.exact_match_drop", 0.09), "generation.stops_missed", 3)
    for order in ([one, two], [two, one]):
        merged = gates.merge_figures(order)
        assert merged["formats"] == ["task", "tflite"]
        assert merged["size_bytes"] == 11
        assert merged["quality"]["exact_match"] == 0.9
        assert merged["quality"]["exact_match_drop"] == 0.09
        assert merged["generation"]["stops_missed"] == 3
        assert refused("none", merged) == {"stop_missed"}


def test_merging_never_fills_in_what_one_format_failed_to_measure() -> None:
    one = {**copy.deepcopy(FLOAT), "format": "tflite"}
    two = {**change(FLOAT, "generation.match_ratio", None), "format": "task"}
    merged = gates.merge_figures([one, two])
    assert "match_ratio" not in merged["generation"]
    assert refused("none", merged) == {"generation_match"}


def test_merging_keeps_what_only_the_graph_shows() -> None:
    graph = {**copy.deepcopy(FLOAT), "format": "tflite"}
    bundle = {**change(FLOAT, "quality.perplexity", None), "format": "litertlm"}
    del bundle["parity"]
    merged = gates.merge_figures([bundle, graph])
    assert (merged["quality"]["perplexity"], merged["parity"]) == (8.0, FLOAT["parity"])
    assert refused("none", merged, {"max_perplexity": 9.0, "max_kl": 1e-9}) == set()


def test_merging_leaves_its_inputs_alone() -> None:
    one, two = {**copy.deepcopy(FLOAT), "format": "tflite"}, {**copy.deepcopy(FLOAT), "format": "task"}
    before = copy.deepcopy([one, two])
    gates.merge_figures([one, two])["parity"]["kl_mean"] = 9.0
    assert [one, two] == before
