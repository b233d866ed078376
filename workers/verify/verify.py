"""The `verify` step: the artifact, run in its real runtime, against what its source answered.

Owns the order of proof and the shape of the figures. Must not judge them (`service.gates` does) and must not import
torch: the source's answers come from `workers.verify.reference`. Run by `workers.runner` in a child. What does not
run, or is not what it claims to be, raises `VerificationFailed`; everything else becomes a figure.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from service.errors import VerificationFailed
from service.recipes import FORMATS, require_known
from workers.steps import Progress, run_by_hand
from workers.verify import conversations, parity, probe, scoring
from workers.verify.conversations import ConversationComparison, Dialect
from workers.verify.generation import Answer, Comparison, cut_generation, decode_tokens, describe_generation
from workers.verify.graph import Graph, count_cores
from workers.verify.graph_answers import (
    GraphAnswers,
    digest_graph,
    read_graph_answers,
    require_same_graph,
    write_graph_answers,
)
from workers.verify.probe import Generation
from workers.verify.runtime import Runtime

#: Evaluation prompts that a bundle's runtime and its own graph are both asked, beside the fixed prompts.
GRAPH_PROMPTS = 16
#: Share of the logit range below which the runtime and the interpreter, on equal graphs, may choose differently.
GRAPH_TIE_RATIO = 1e-3
#: Tokens of each answer in which the runtime is compared with its own graph.
GRAPH_TOKENS = 8


@dataclass(frozen=True)
class Asked:
    """An artifact that answers prompts of the reference: a bare graph or a bundle in its runtime."""

    answer: Callable[[Mapping[str, Any]], Answer]
    #: Whether the artifact's tokenizer reads a prompt as the source's does.
    is_alike: Callable[[Mapping[str, Any]], bool]
    #: How the artifact prints tokens.
    decode: Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Reference:
    """The source's answers, as the `reference` step left them."""

    document: Mapping[str, Any]
    cases: list[probe.Case]
    logits: probe.Floats
    tokenizer: Tokenizer

    @property
    def text_windows(self) -> list[scoring.Window]:
        """The text that is scored, with the source's losses."""
        return [scoring.Window(**window) for window in self.document["text_windows"]]

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end the source's generations."""
        return frozenset(self.document["stop_tokens"])


def run(params: Mapping[str, Any], inputs: Mapping[str, Path], output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Run one artifact and return its figures; the proof of a bare graph leaves `graph.json` for those of its bundles.

    `params`: `format`, `recipe`, `context_length` in tokens, `prefill_lengths`. `inputs`: `reference`; for a bare
    graph `quantize`, for a bundle `bundle` and `verify_tflite`, the outputs of its graph's proof. Raises
    `VerificationFailed`.
    """
    kind = require_known("format", str(params["format"]), FORMATS)
    artifact = inputs["quantize" if kind == "tflite" else "bundle"] / f"model.{kind}"
    if not artifact.is_file():
        raise VerificationFailed(f"There is no {artifact.name} to verify.", file=artifact.name)
    figures = {"format": kind, "recipe": str(params["recipe"]), "size_bytes": artifact.stat().st_size}
    progress("reading the source's answers", 0.0)
    reference = load_reference(inputs["reference"])
    if kind != "tflite":
        answers = read_graph_answers(inputs["verify_tflite"])
        require_same_graph(artifact, answers)
        return figures | prove_bundle(artifact, answers, reference, progress)
    progress("opening the graph", 0.02)
    graph = Graph(artifact)
    parity.require_stated_settings(graph, int(params["context_length"]), params["prefill_lengths"])
    proven, answers = prove_graph(graph, reference, progress, digest_graph(artifact))
    write_graph_answers(answers, output_dir)
    return figures | proven


def load_reference(folder: Path) -> Reference:
    """Read what the `reference` step wrote."""
    document = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    with np.load(folder / "reference.npz", allow_pickle=False) as arrays:
        logits = arrays["logits"]
    cases = [probe.Case(**case) for case in document["cases"]]
    return Reference(document, cases, logits, Tokenizer.from_file(str(folder / "tokenizer.json")))


def prove_graph(
    graph: Graph, reference: Reference, progress: Progress, digest: str
) -> tuple[dict[str, Any], GraphAnswers]:
    """Return parity, quality and generation figures of a bare graph, and what its bundles are held to."""
    cases = reference.cases
    logits = parity.answer_cases(graph, cases, progress)
    compared = parity.compare_cases(cases, reference.logits, logits)
    generations: list[Generation] = []

    def answer(item: Mapping[str, Any]) -> Answer:
        generation = graph.generate(item["tokens"], item["limit_tokens"], reference.stop_tokens)
        generations.append(generation)
        return describe_generation(reference.tokenizer, len(item["tokens"]), generation)

    asked = Asked(answer, lambda item: True, lambda tokens: decode_tokens(reference.tokenizer, tokens))
    answers = ask_everything(asked, reference, progress)
    progress("losses on the text", 0.95)
    windows = reference.text_windows
    losses = [parity.measure_loss(graph, window.tokens) for window in windows]
    perplexity = {
        "perplexity": probe.measure_perplexity(logits, cases),
        "source_perplexity": reference.document["perplexity"],
    }
    figures = {
        "parity": compared,
        "quality": perplexity | scoring.describe_perplexity(losses, windows) | measure_accuracy(answers, reference),
        "generation": compare_with_source(asked, answers, reference, 2 * compared["max_abs_error"]),
        "context": describe_context(reference, max(case.positions.stop for case in cases)),
    }
    shared = generations[: len(select_graph_items(reference))]
    kept = [cut_generation(generation, GRAPH_TOKENS) for generation in shared]
    return figures, GraphAnswers(digest, compared["max_abs_error"], losses, kept)


def select_graph_items(reference: Reference) -> list[Mapping[str, Any]]:
    """Return what both the runtime and the interpreter are asked."""
    return [*reference.document["prompts"], *reference.document["evaluation"][:GRAPH_PROMPTS]]


def prove_bundle(artifact: Path, own: GraphAnswers, reference: Reference, progress: Progress) -> dict[str, Any]:
    """Return everything that only the real runtime can show; what its graph shows is proven with the graph."""
    progress("opening the runtime", 0.1)
    with Runtime(artifact, has_byte_fallback(reference.tokenizer), count_cores()) as runtime:

        def answer(item: Mapping[str, Any]) -> Answer:
            return runtime.answer(fit_prompt(item, runtime), item["limit_tokens"])

        def is_alike(item: Mapping[str, Any]) -> bool:
            return runtime.encode(str(item["prompt"])) == list(item["tokens"])

        asked = Asked(answer, is_alike, runtime.decode)
        answers = ask_everything(asked, reference, progress)
        margin = 2 * own.max_abs_error
        declared = {sequence[0] for sequence in runtime.stop_tokens if len(sequence) == 1}
        proven: dict[str, Any] = {
            "generation": compare_with_source(asked, answers, reference, margin),
            "graph_generation": compare_with_graph(asked, answers, own, reference),
            "context": describe_context(reference, fill_context(runtime, answers, reference)),
            "tokenizer": runtime.compare_tokenizer(reference.document["tokenizer_samples"])
            | {"source_restored": reference.document["tokenizer_restored"]},
            "stop_tokens": {
                "expected": sorted(reference.stop_tokens),
                "declared": sorted(declared),
                "missing": len(reference.stop_tokens - declared),
            },
        }
        progress("losses on the text", 0.95)
        proven |= measure_text(runtime, own, reference)
        proven["quality"] |= measure_accuracy(answers, reference)
        progress("conversations", 0.97)
        proven |= converse(runtime, reference, margin)
    return proven


def measure_text(runtime: Runtime, own: GraphAnswers, reference: Reference) -> dict[str, Any]:
    """Return the figures of perplexity in the runtime, and under `graph_scoring` how they agree with the graph's.

    Where the runtime's tokenizer reads no window as the source's does once the start token is written out in front,
    the windows are scored without it, and compared with the source alone.
    """
    windows = reference.text_windows
    start = "" if runtime.start_token is None else runtime.decode([runtime.start_token])
    texts = [start + window.text if window.plain_loss is not None else window.text for window in windows]
    is_alike = [runtime.encode_plain(text) == window.tokens for text, window in zip(texts, windows, strict=True)]
    is_plain = not any(is_alike)
    if is_plain:
        texts = [window.text for window in windows]
        is_alike = [
            window.plain_loss is not None and runtime.encode_plain(window.text) == window.tokens[1:]
            for window in windows
        ]
    losses = [runtime.measure_loss(text) if alike else None for text, alike in zip(texts, is_alike, strict=True)]
    figures: dict[str, Any] = {"quality": scoring.describe_perplexity(losses, windows, is_plain=is_plain)}
    scored = zip(losses, own.text_losses, windows, strict=True)
    pairs = [(loss, expected, window) for loss, expected, window in scored if loss is not None]
    if pairs and not is_plain:
        errors = [abs(loss - expected) / window.scored_tokens for loss, expected, window in pairs]
        figures["graph_scoring"] = {"max_loss_error": max(errors), "windows": len(pairs)}
    return figures


def converse(runtime: Runtime, reference: Reference, near_tie_margin: float) -> dict[str, Any]:
    """Return the figures `conversation` and `conversation_generation`; none where the source has no chat template."""
    rendered = conversations.read_rendered(reference.document)
    declined = reference.document["conversations_declined"]
    if not rendered:
        # A template that declines all of them leaves nothing that a gate could pass.
        return {"conversation": {"samples": 0, "declined": declined}} if declined else {}
    dialect = Dialect(runtime.render, runtime.encode_plain, runtime.start_token)
    comparison = ConversationComparison(reference.tokenizer, dialect, datetime.datetime.now())
    matched = {each.name for each in rendered if comparison.add(each)}
    figures = comparison.describe() | {"declined": declined}
    replies = Comparison(runtime.decode, near_tie_margin)
    by_name = {each.name: each for each in rendered}
    for item in reference.document["replies"]:
        given = runtime.reply(by_name[item["name"]], item["limit_tokens"]) if item["name"] in matched else None
        if given is None:
            replies.skip()
        else:
            replies.add(item["prompt"], item["limit_tokens"], expected_generation(item), given)
    return {"conversation": figures, "conversation_generation": replies.describe()}


def fill_context(runtime: Runtime, answers: Sequence[Answer], reference: Reference) -> int:
    """Return how many tokens of context the runtime used.

    A stop token may end the answer to the long prompt early: then a prompt that leaves room for one token is asked.
    """
    stated = int(reference.document["context_length"])
    items = zip(reference.document["prompts"], answers, strict=False)
    item, given = next((item, given) for item, given in items if item.get("fills_context"))
    used_tokens = given.prompt_tokens + given.generated_tokens
    if used_tokens < stated:
        text = probe.fit_text(runtime.encode, stated - 1, str(item["prompt"]))
        longer = runtime.answer(text, stated - len(runtime.encode(text)))
        used_tokens = max(used_tokens, longer.prompt_tokens + longer.generated_tokens)
    return used_tokens


def describe_context(reference: Reference, usable_tokens: int) -> dict[str, int]:
    """Return the figures `context`."""
    stated = int(reference.document["context_length"])
    return {"stated_tokens": stated, "usable_tokens": usable_tokens, "unusable_tokens": stated - usable_tokens}


def has_byte_fallback(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer spells characters it does not know as bytes, one token each."""
    return bool(json.loads(tokenizer.to_str())["model"].get("byte_fallback"))


def fit_prompt(item: Mapping[str, Any], runtime: Runtime) -> str:
    """Return the prompt; one that should nearly fill the context is measured with the runtime's own tokenizer."""
    text = str(item["prompt"])
    if item.get("fills_context") and len(runtime.encode(text)) != len(item["tokens"]):
        return probe.fit_text(runtime.encode, len(item["tokens"]), text)
    return text


def ask_everything(asked: Asked, reference: Reference, progress: Progress) -> list[Answer]:
    """Return the artifact's answers to the prompts and then to the evaluation."""
    items = [*reference.document["prompts"], *reference.document["evaluation"]]
    answers = []
    for number, item in enumerate(items):
        if number % 32 == 0:
            progress("generating", 0.65 + 0.3 * number / len(items))
        answers.append(asked.answer(item))
    return answers


def measure_accuracy(answers: Sequence[Answer], reference: Reference) -> dict[str, float | int]:
    """Return exact match on the evaluation, of artifact and source; nothing when the checkpoint has none.

    A prompt that the artifact's tokenizer reads differently counts: it is what users see.
    """
    evaluation = reference.document["evaluation"]
    if not evaluation:
        return {}
    given = answers[len(reference.document["prompts"]) :]
    pairs = zip(given, evaluation, strict=True)
    exact_match = sum(probe.first_line(answer.text) == item["answer"] for answer, item in pairs) / len(evaluation)
    source_exact_match = sum(item["is_correct"] for item in evaluation) / len(evaluation)
    return {
        "exact_match": exact_match,
        "exact_match_count": len(evaluation),
        "source_exact_match": source_exact_match,
        "exact_match_drop": source_exact_match - exact_match,
    }


def compare_with_source(
    asked: Asked, answers: Sequence[Answer], reference: Reference, near_tie_margin: float
) -> dict[str, Any]:
    """Return how the answers agree with the source's; prompts read as other tokens are not compared."""
    items = [*reference.document["prompts"], *reference.document["evaluation"]]
    comparison = Comparison(asked.decode, near_tie_margin)
    for item, given in zip(items, answers, strict=True):
        if asked.is_alike(item):
            comparison.add(item["prompt"], item["limit_tokens"], expected_generation(item), given)
        else:
            comparison.skip()
    return comparison.describe()


def compare_with_graph(
    asked: Asked, answers: Sequence[Answer], own: GraphAnswers, reference: Reference
) -> dict[str, Any]:
    """Return how the runtime's answers agree with the interpreter's on the very same graph, whatever the recipe."""
    margin = GRAPH_TIE_RATIO * float(reference.logits.max() - reference.logits.min())
    comparison = Comparison(asked.decode, margin)
    items = select_graph_items(reference)
    for item, expected, given in zip(items, own.generations, answers[: len(items)], strict=True):
        if asked.is_alike(item):
            comparison.add(item["prompt"], item["limit_tokens"], expected, given)
        else:
            comparison.skip()
    return comparison.describe()


def expected_generation(item: Mapping[str, Any]) -> Generation:
    """Return what the source generated for one prompt of the reference."""
    return Generation(item["generated"], item["margins"], item["stopped"])


if __name__ == "__main__":
    sys.exit(run_by_hand(run, "Run an artifact against its source's answers."))
