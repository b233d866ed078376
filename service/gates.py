"""Gates: which figures an artifact must reach before it is published. Pure; no I/O, no third-party import.

Owns the default thresholds of every recipe class (`docs/decisions/0005-default-gates.md` says where they come from),
the names of the gates that users may add, and the judgement. Must not measure anything: figures come from the
`verify` and `benchmark` steps. Called by `service.requests`, `service.ledger` and the publish step. A figure that a
gate names and nobody measured is a refusal, never a pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from service.recipes import RECIPES, require_known

#: Whether a figure must stay at or below its threshold, or reach it.
Bound = Literal["at_most", "at_least"]


@dataclass(frozen=True)
class Gate:
    """One threshold on one figure."""

    #: Stable name; wire format.
    name: str
    #: Dotted path of the figure in the merged figures.
    figure_name: str
    bound: Bound
    #: What the figure is, as the subject of a sentence.
    subject: str


@dataclass(frozen=True)
class Verdict:
    """One gate, judged."""

    gate: str
    figure_name: str
    #: The measured figure; None when it is missing.
    figure: float | None
    threshold: float
    passed: bool
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """Return the form that manifests and errors carry."""
        return {
            "gate": self.gate,
            "figure_name": self.figure_name,
            "figure": self.figure,
            "threshold": self.threshold,
            "passed": self.passed,
            "sentence": self.sentence,
        }


def _index(*gates: Gate) -> dict[str, Gate]:
    return {gate.name: gate for gate in gates}


#: Gates that a request may name, each with a threshold.
GATES: dict[str, Gate] = _index(
    Gate("max_abs_error_ratio", "parity.max_abs_error_ratio", "at_most", "The largest logit error over the range"),
    Gate("max_kl", "parity.kl_mean", "at_most", "The mean KL divergence from the source, in nats,"),
    Gate("max_kl_worst", "parity.kl_max", "at_most", "The KL divergence at the worst position, in nats,"),
    Gate("min_top1", "parity.top1_agreement", "at_least", "The teacher-forced top-1 agreement with the source"),
    Gate("max_perplexity", "quality.perplexity", "at_most", "The perplexity on the probe"),
    Gate("min_exact_match", "quality.exact_match", "at_least", "The exact match on the evaluation"),
    Gate("max_exact_match_drop", "quality.exact_match_drop", "at_most", "The loss of exact match against the source"),
    Gate("min_generation_match", "generation.match_ratio", "at_least", "The share of the source's tokens generated"),
    Gate("max_tokenizer_mismatch", "tokenizer.mismatch_ratio", "at_most", "The tokenizer's mismatch in the runtime"),
    Gate("max_size_bytes", "size_bytes", "at_most", "The size of the largest artifact, in bytes,"),
    Gate("min_prefill_tokens_per_s", "benchmark.prefill_tokens_per_s", "at_least", "The prefill speed in tokens/s"),
    Gate("min_decode_tokens_per_s", "benchmark.decode_tokens_per_s", "at_least", "The decode speed in tokens/s"),
    Gate("max_ttft_s", "benchmark.ttft_s", "at_most", "The time to first token, in seconds,"),
    Gate("max_peak_anon_bytes", "benchmark.peak_anon_bytes", "at_most", "The peak anonymous memory, in bytes,"),
)

_USABLE_CONTEXT = Gate("usable_context", "context.unusable_tokens", "at_most", "The unusable part of the context")
_FLOAT_ERROR = Gate(
    "float_error", "parity.max_abs_error_ratio", "at_most", "The largest logit error over the range of logits"
)
_CONFIDENT_TOP1 = Gate(
    "confident_top1", "parity.top1_agreement_confident", "at_least", "The top-1 agreement beyond twice the error"
)
_CONFIDENT_SHARE = Gate(
    "confident_share", "parity.confident_share", "at_least", "The share of positions beyond twice the error"
)
_GENERATION = Gate(
    "generation_match", "generation.match_ratio", "at_least", "The share of the source's sure tokens generated"
)
_STOP_MISSED = Gate("stop_missed", "generation.stops_missed", "at_most", "The count of stop tokens that did not stop")
_LOSSY_KL = Gate("lossy_kl", "parity.kl_mean", "at_most", "The mean KL divergence from the source, in nats,")
_LOSSY_TOP1 = Gate(
    "lossy_top1", "parity.top1_agreement_sure", "at_least", "The top-1 agreement where the source is sure"
)
_LOSSY_EXACT_MATCH = Gate(
    "lossy_exact_match_drop", "quality.exact_match_drop", "at_most", "The loss of exact match against the source"
)
_STOP_DECLARED = Gate(
    "stop_declared", "stop_tokens.missing", "at_most", "The count of the source's stop tokens missing in the bundle"
)
_RUNTIME_MATCH = Gate(
    "runtime_match", "graph_generation.match_ratio", "at_least", "The share of the graph's own tokens in the runtime"
)
_RUNTIME_STOPS = Gate(
    "runtime_stops", "graph_generation.stops_missed", "at_most", "The count of the graph's stops the runtime missed"
)

Thresholds = tuple[tuple[Gate, float], ...]


@dataclass(frozen=True)
class LossyLimits:
    """Default thresholds of one lossy recipe."""

    kl_mean: float
    top1_agreement_sure: float
    exact_match_drop: float


#: Hold for every artifact.
_ALWAYS: Thresholds = ((_USABLE_CONTEXT, 0.0),)

#: Hold for float graphs: the converter may round, nothing else.
_FLOAT: Thresholds = (
    (_FLOAT_ERROR, 1e-3),
    (_CONFIDENT_TOP1, 1.0),
    (_CONFIDENT_SHARE, 0.8),
    (_GENERATION, 1.0),
    (_STOP_MISSED, 0.0),
)

#: Hold for `.task` and `.litertlm`, whatever the recipe.
_BUNDLE: Thresholds = ((_STOP_DECLARED, 0.0), (_RUNTIME_MATCH, 0.95), (_RUNTIME_STOPS, 0.0))

_INT8 = LossyLimits(kl_mean=0.05, top1_agreement_sure=0.97, exact_match_drop=0.02)
_INT4 = LossyLimits(kl_mean=0.2, top1_agreement_sure=0.9, exact_match_drop=0.03)

LOSSY_LIMITS: dict[str, LossyLimits] = {
    "float16": LossyLimits(kl_mean=0.001, top1_agreement_sure=0.99, exact_match_drop=0.01),
    "dynamic_int8": _INT8,
    "weight_only_int8": _INT8,
    "dynamic_int4": _INT4,
    "weight_only_int4": _INT4,
}

#: Fewer sure positions than these say too little about a lossy artifact's top-1 agreement.
MIN_SURE_POSITIONS = 16


def needs_benchmark(user_gates: Mapping[str, float] | None) -> bool:
    """Return whether any named gate reads a figure that only a benchmark yields."""
    return any(GATES[name].figure_name.startswith("benchmark.") for name in user_gates or {} if name in GATES)


def judge(recipe: str, figures: Mapping[str, Any], user_gates: Mapping[str, float] | None = None) -> list[Verdict]:
    """Judge the merged figures of one variant by the recipe's default gates and the user's own.

    `figures` is what `merge_figures` returns, with `benchmark` beside it where a gate needs it. Raises `UnknownName`
    for a recipe or gate that does not exist.
    """
    require_known("recipe", recipe, RECIPES)
    for name in user_gates or {}:
        require_known("gate", name, GATES)
    thresholds = list(select_defaults(recipe, figures))
    thresholds += [(GATES[name], float(threshold)) for name, threshold in sorted((user_gates or {}).items())]
    return [_judge_one(gate, threshold, figures) for gate, threshold in thresholds]


def select_defaults(recipe: str, figures: Mapping[str, Any]) -> Thresholds:
    """Return the default gates of a recipe, for the formats that were verified.

    Bundle gates hold when a bundle is among `formats`. What only the source decides opens two lossy gates: exact
    match when it has an evaluation, top-1 when it is sure at enough positions (random weights seldom are).
    """
    chosen = _ALWAYS
    if RECIPES[recipe].is_lossy:
        limits = LOSSY_LIMITS[recipe]
        chosen += ((_LOSSY_KL, limits.kl_mean),)
        sure_positions = find_figure(figures, "parity.sure_positions")
        if sure_positions is None or sure_positions >= MIN_SURE_POSITIONS:
            chosen += ((_LOSSY_TOP1, limits.top1_agreement_sure),)
        if find_figure(figures, "quality.source_exact_match") is not None:
            chosen += ((_LOSSY_EXACT_MATCH, limits.exact_match_drop),)
    else:
        chosen += _FLOAT
    if set(figures.get("formats", ())) - {"tflite"}:
        chosen += _BUNDLE
    return chosen


def find_figure(figures: Mapping[str, Any], name: str) -> float | None:
    """Return the figure at a dotted path; None when it is missing or not a finite number."""
    value: Any = figures
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _judge_one(gate: Gate, threshold: float, figures: Mapping[str, Any]) -> Verdict:
    figure = find_figure(figures, gate.figure_name)
    relation = "at most" if gate.bound == "at_most" else "at least"
    if figure is None:
        passed = False
        sentence = f"{gate.subject} ({gate.figure_name}) was not measured; the gate {gate.name} needs it."
    else:
        passed = figure <= threshold if gate.bound == "at_most" else figure >= threshold
        outcome = "" if passed else ", which the artifact misses"
        sentence = f"{gate.subject} is {figure:.6g}; the gate {gate.name} asks for {relation} {threshold:.6g}{outcome}."
    return Verdict(gate.name, gate.figure_name, figure, threshold, passed, sentence)


#: How equal figures of several formats become one: the worst counts. Figures not listed are kept from the first, as
#: `quality.perplexity`, which only the graph has.
_WORST: dict[str, Callable[[Iterable[float]], float]] = {
    "size_bytes": max,
    "parity.max_abs_error": max,
    "parity.mean_abs_error": max,
    "parity.max_abs_error_ratio": max,
    "parity.top1_agreement": min,
    "parity.top1_agreement_confident": min,
    "parity.top1_agreement_sure": min,
    "parity.confident_share": min,
    "parity.kl_mean": max,
    "parity.kl_max": max,
    "quality.exact_match": min,
    "quality.exact_match_drop": max,
    "generation.match_ratio": min,
    "generation.stops_missed": max,
    "graph_generation.match_ratio": min,
    "graph_generation.stops_missed": max,
    "tokenizer.mismatch_ratio": max,
    "stop_tokens.missing": max,
    "context.usable_tokens": min,
    "context.unusable_tokens": max,
}


def merge_figures(verified: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the figures of all `verify` steps of one variant; where formats differ the worst figure counts.

    A figure that a gate reads and that one format's step lacks although another of the same kind has it stays
    missing: the result has `formats`, the sorted formats that were verified.
    """
    documents = sorted(verified, key=lambda figures: str(figures.get("format")))
    merged: dict[str, Any] = {}
    for figures in reversed(documents):
        merged = _overlay(merged, figures)
    merged.pop("format", None)
    merged["formats"] = [str(figures["format"]) for figures in documents]
    for name, worst in _WORST.items():
        section, _, leaf = name.rpartition(".")
        holders = [figures for figures in documents if not section or section in figures]
        values = [
            figures[section][leaf] if section else figures[leaf]
            for figures in holders
            if find_figure(figures, name) is not None
        ]
        target = merged.get(section, {}) if section else merged
        if values and len(values) == len(holders):
            target[leaf] = worst(values)
        else:
            target.pop(leaf, None)
    return merged


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return both trees as one of fresh dictionaries; values of `above` win."""
    result = {key: _overlay({}, value) if isinstance(value, Mapping) else value for key, value in below.items()}
    for key, value in above.items():
        base = result.get(key)
        if isinstance(value, Mapping):
            result[key] = _overlay(base if isinstance(base, Mapping) else {}, value)
        else:
            result[key] = value
    return result
