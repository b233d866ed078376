"""Gates: which figures an artifact must reach before it is published. Pure; no I/O, no third-party import.

Owns the default thresholds of every recipe class (`docs/decisions/0005-default-gates.md` says where they come from),
the names of the gates that users may add, and the judgement. Must not measure anything: figures come from the
`verify` and `benchmark` steps. Called by `service.requests`, `service.ledger` and the publish step. A figure that a
gate names and nobody measured is a refusal, never a pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from service.errors import UnknownName
from service.recipes import RECIPES, is_own_name, require_known

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
    bound: Bound
    threshold: float
    passed: bool
    sentence: str
    #: What the threshold would be, had the request not set another; None where it is what it would be.
    overridden: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the form that manifests and errors carry; `overridden` only where a request set a default gate."""
        document = {
            "gate": self.gate,
            "figure_name": self.figure_name,
            "figure": self.figure,
            "bound": self.bound,
            "threshold": self.threshold,
            "passed": self.passed,
            "sentence": self.sentence,
        }
        return document if self.overridden is None else {**document, "overridden": self.overridden}


def _index(*gates: Gate) -> dict[str, Gate]:
    return {gate.name: gate for gate in gates}


#: Gates that a request may add, each with a threshold.
GATES: dict[str, Gate] = _index(
    Gate("max_abs_error_ratio", "parity.max_abs_error_ratio", "at_most", "The largest logit error over the range"),
    Gate("max_kl", "parity.kl_mean", "at_most", "The mean KL divergence from the source, in nats,"),
    Gate("max_kl_worst", "parity.kl_max", "at_most", "The KL divergence at the worst position, in nats,"),
    Gate("min_top1", "parity.top1_agreement", "at_least", "The teacher-forced top-1 agreement with the source"),
    Gate("max_perplexity", "quality.perplexity", "at_most", "The perplexity on the probe"),
    Gate("max_text_perplexity", "quality.text_perplexity", "at_most", "The perplexity on the text"),
    Gate("max_perplexity_increase", "quality.perplexity_increase", "at_most", "The increase of the text's perplexity"),
    Gate("min_exact_match", "quality.exact_match", "at_least", "The exact match on the evaluation"),
    Gate("max_exact_match_drop", "quality.exact_match_drop", "at_most", "The loss of exact match against the source"),
    Gate("min_generation_match", "generation.match_ratio", "at_least", "The share of the source's tokens generated"),
    Gate(
        "min_conversation_match", "conversation.match_ratio", "at_least", "The share of conversations with equal tokens"
    ),
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
_CONVERSATION_RENDERED = Gate(
    "conversation_rendered",
    "conversation.misrendered",
    "at_most",
    "The count of conversations that the runtime renders otherwise than transformers",
)
_CONVERSATION_STOPS = Gate(
    "conversation_stops",
    "conversation_generation.stops_missed",
    "at_most",
    "The count of conversations that the runtime did not end where the source ends them",
)
_RUNTIME_SCORES = Gate(
    "runtime_scores",
    "graph_scoring.max_loss_error",
    "at_most",
    "The distance of the runtime's losses from the graph's, in nats a token,",
)

#: Default gates whose threshold a request may set by their name, as what a recipe may cost is its user's to decide. The
#: others guard that an artifact is what it claims to be.
OVERRIDABLE: dict[str, Gate] = _index(_LOSSY_KL, _LOSSY_TOP1, _LOSSY_EXACT_MATCH)

#: Everything that `gates` of a request may name.
NAMEABLE: dict[str, Gate] = {**GATES, **OVERRIDABLE}

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

#: Hold for bundles of a source with a chat template.
_CONVERSATION: Thresholds = ((_CONVERSATION_RENDERED, 0.0), (_CONVERSATION_STOPS, 0.0))

#: Holds for bundles whose tokenizer reads the text as the source's does.
_SCORING: Thresholds = ((_RUNTIME_SCORES, 0.01),)

#: No request sets these.
_GUARDS: Thresholds = (*_ALWAYS, *_FLOAT, *_BUNDLE, *_CONVERSATION, *_SCORING)

_INT8 = LossyLimits(kl_mean=0.05, top1_agreement_sure=0.97, exact_match_drop=0.02)
_INT4 = LossyLimits(kl_mean=0.2, top1_agreement_sure=0.9, exact_match_drop=0.03)

LOSSY_LIMITS: dict[str, LossyLimits] = {
    "float16": LossyLimits(kl_mean=0.001, top1_agreement_sure=0.99, exact_match_drop=0.01),
    "dynamic_int8": _INT8,
    "weight_only_int8": _INT8,
    "dynamic_int4": _INT4,
    "weight_only_int4": _INT4,
    "dynamic_int4_block32": _INT4,
    "dynamic_int4_block64": _INT4,
    "dynamic_int4_block128": _INT4,
    "mixed_int4": _INT4,
    "static_int8": _INT8,
    "static_int16": _INT8,
}

#: An own recipe may be anything; it gets the widest limits, which tell a broken graph alone.
OWN_LIMITS = _INT4

#: Fewer sure positions than these say too little about a lossy artifact's top-1 agreement.
MIN_SURE_POSITIONS = 16


def needs_benchmark(user_gates: Mapping[str, float] | None) -> bool:
    """Return whether any named gate reads a figure that only a benchmark yields."""
    return any(GATES[name].figure_name.startswith("benchmark.") for name in user_gates or {} if name in GATES)


def judge(recipe: str, figures: Mapping[str, Any], user_gates: Mapping[str, float] | None = None) -> list[Verdict]:
    """Judge the merged figures of one variant by the recipe's default gates and the user's own.

    `user_gates` adds gates, and sets thresholds of `OVERRIDABLE` ones where the recipe has them, in either direction.
    `figures` is what `merge_figures` returns, with `benchmark` beside it where a gate needs it. Raises `UnknownName`
    for a gate that does not exist and for a name that no recipe can have.
    """
    if not is_own_name(recipe):
        require_known("recipe", recipe, RECIPES)
    asked = dict(user_gates or {})
    for name in asked:
        require_nameable(name)
    verdicts = []
    for gate, default in select_defaults(recipe, figures):
        threshold = float(asked.get(gate.name, default))
        verdict = judge_gate(gate, threshold, figures)
        verdicts.append(verdict if threshold == default else replace(verdict, overridden=default))
    added = [(GATES[name], float(threshold)) for name, threshold in sorted(asked.items()) if name in GATES]
    return [*verdicts, *(judge_gate(gate, threshold, figures) for gate, threshold in added)]


def require_nameable(name: str) -> None:
    """Raise `UnknownName` unless a request may name the gate; those that guard the truth it may not."""
    if any(gate.name == name for gate, _ in _GUARDS):
        raise UnknownName(
            f"The gate {name!r} guards that an artifact is what it claims to be; its threshold stands. A request may "
            f"add {', '.join(GATES)}, and set {', '.join(OVERRIDABLE)}.",
            kind="gate",
            name=name,
            known=list(NAMEABLE),
        )
    require_known("gate", name, NAMEABLE)


def select_defaults(recipe: str, figures: Mapping[str, Any]) -> Thresholds:
    """Return the default gates of a recipe, for the formats that were verified.

    Bundle gates hold when a bundle is among `formats`. What only the source decides opens two lossy gates: exact
    match when it has an evaluation, top-1 when it is sure at enough positions (random weights seldom are).
    """
    chosen = _ALWAYS
    if recipe not in RECIPES or RECIPES[recipe].is_lossy:
        limits = LOSSY_LIMITS.get(recipe, OWN_LIMITS)
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
        if find_figure(figures, "conversation.samples") is not None:
            chosen += _CONVERSATION
        if find_figure(figures, "graph_scoring.windows") is not None:
            chosen += _SCORING
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


def judge_gate(gate: Gate, threshold: float, figures: Mapping[str, Any]) -> Verdict:
    """Hold one figure against one threshold; a missing figure does not pass."""
    figure = find_figure(figures, gate.figure_name)
    relation = "at most" if gate.bound == "at_most" else "at least"
    if figure is None:
        passed = False
        sentence = f"{gate.subject} ({gate.figure_name}) was not measured; the gate {gate.name} needs it."
    else:
        passed = figure <= threshold if gate.bound == "at_most" else figure >= threshold
        outcome = "" if passed else ", which the artifact misses"
        asked = f"{relation} {_format(threshold)}"
        sentence = f"{gate.subject} is {_format(figure)}; the gate {gate.name} asks for {asked}{outcome}."
    return Verdict(gate.name, gate.figure_name, figure, gate.bound, threshold, passed, sentence)


def _format(figure: float) -> str:
    """Return a figure so that it can be read and told from its threshold: bytes whole, the rest to six digits."""
    return f"{figure:,.0f}" if abs(figure) >= 1e5 else f"{figure:.6g}"


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
    "quality.text_perplexity": max,
    "quality.perplexity_increase": max,
    "graph_scoring.max_loss_error": max,
    "conversation.match_ratio": min,
    "conversation.misrendered": max,
    "conversation.misread": max,
    "conversation_generation.stops_missed": max,
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


#: How the figures of several benchmarks become one: the worst counts.
_WORST_MEASURED: dict[str, Callable[[Iterable[float]], float]] = {
    "prefill_tokens_per_s": min,
    "decode_tokens_per_s": min,
    "ttft_s": max,
    "peak_anon_bytes": max,
}


def merge_benchmarks(benchmarks: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the worst median of every gated figure over the benchmarks that measured it."""
    documents = list(benchmarks)
    merged = {}
    for name, worst in _WORST_MEASURED.items():
        measured = [figures[name] for figures in documents if figures.get(name) is not None]
        if measured:
            merged[name] = worst(value["median"] if isinstance(value, Mapping) else value for value in measured)
    return merged
