"""The `verify` step: the artifact, run in its real runtime, against what its source answered.

Owns the order of proof and the shape of the figures. Must not judge them (`service.gates` does) and must not import
torch: the source's answers come from `workers.verify.reference`. Run by `workers.runner` in a child. What does not
run, or is not what it claims to be, raises `VerificationFailed`; everything else becomes a figure.
"""

from __future__ import annotations

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
from workers.verify import contents, parity, probe
from workers.verify.generation import Answer, Comparison, decode_tokens, describe_generation
from workers.verify.graph import Graph, count_cores
from workers.verify.probe import Generation
from workers.verify.runtime import Runtime

#: Evaluation prompts that a bundle's runtime and its own graph are both asked, beside the fixed prompts.
GRAPH_PROMPTS = 16
#: Share of the logit range below which the runtime and the interpreter, on equal graphs, may choose differently.
GRAPH_TIE_RATIO = 1e-3
#: Tokens of each answer in which the runtime is compared with its own graph.
GRAPH_TOKENS = 8
#: A bundle's near-ties are told by the graph's error at the end of the context alone: those few rows may miss the
#: largest error, so they count twice.
SAMPLE_ALLOWANCE = 2.0


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
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end the source's generations."""
        return frozenset(self.document["stop_tokens"])


def run(params: Mapping[str, Any], inputs: Mapping[str, Path], output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Run one artifact and return its figures; no file is written.

    `params`: `format`, `recipe`, `context_length` in tokens, `prefill_lengths`. `inputs`: `reference`, `quantize`
    and, for a bundle, `bundle`. Raises `VerificationFailed`.
    """
    kind = require_known("format", str(params["format"]), FORMATS)
    graph_path = inputs["quantize"] / "model.tflite"
    artifact = graph_path if kind == "tflite" else inputs["bundle"] / f"model.{kind}"
    if not artifact.is_file():
        raise VerificationFailed(f"There is no {artifact.name} to verify.", file=artifact.name)
    if kind != "tflite":
        progress("comparing the bundle's graph", 0.0)
        contents.require_same_graph(artifact, graph_path)
    progress("opening the graph", 0.02)
    reference = load_reference(inputs["reference"])
    graph = Graph(graph_path)
    parity.require_stated_settings(graph, int(params["context_length"]), params["prefill_lengths"])
    figures = {"format": kind, "recipe": str(params["recipe"]), "size_bytes": artifact.stat().st_size}
    if kind == "tflite":
        return figures | prove_graph(graph, reference, progress)
    own = answer_with_graph(graph, reference, progress)
    # The runtime holds the weights once more.
    del graph
    return figures | prove_bundle(artifact, own, reference, progress)


def load_reference(folder: Path) -> Reference:
    """Read what the `reference` step wrote."""
    document = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    with np.load(folder / "reference.npz", allow_pickle=False) as arrays:
        logits = arrays["logits"]
    cases = [probe.Case(**case) for case in document["cases"]]
    return Reference(document, cases, logits, Tokenizer.from_file(str(folder / "tokenizer.json")))


def prove_graph(graph: Graph, reference: Reference, progress: Progress) -> dict[str, Any]:
    """Return parity, accuracy and generation figures of a bare graph, run in the interpreter."""
    cases = reference.cases
    logits = parity.answer_cases(graph, cases, progress)
    compared = parity.compare_cases(cases, reference.logits, logits)

    def answer(item: Mapping[str, Any]) -> Answer:
        generation = graph.generate(item["tokens"], item["limit_tokens"], reference.stop_tokens)
        return describe_generation(reference.tokenizer, len(item["tokens"]), generation)

    asked = Asked(answer, lambda item: True, lambda tokens: decode_tokens(reference.tokenizer, tokens))
    answers = ask_everything(asked, reference, progress)
    perplexity = {
        "perplexity": probe.measure_perplexity(logits, cases),
        "source_perplexity": reference.document["perplexity"],
    }
    return {
        "parity": compared,
        "quality": perplexity | measure_accuracy(answers, reference),
        "generation": compare_with_source(asked, answers, reference, 2 * compared["max_abs_error"]),
        "context": describe_context(reference, max(case.positions.stop for case in cases)),
    }


@dataclass(frozen=True)
class OwnAnswers:
    """What the interpreter answers with the very graph that a bundle holds."""

    #: Generations of the fixed prompts and the first of the evaluation, in that order.
    generations: list[Generation]
    #: Largest absolute error of a logit at the end of the context.
    sampled_error: float


def answer_with_graph(graph: Graph, reference: Reference, progress: Progress) -> OwnAnswers:
    """Ask the interpreter what the runtime will be held to; the rest is proven with the bare graph."""
    rows = parity.find_rows(reference.cases, "context_end")
    cases = [case for case in reference.cases if case.name == "context_end"]
    logits = parity.answer_cases(graph, cases, progress, share=0.1)
    progress("generating with the graph", 0.2)
    generations = [
        graph.generate(item["tokens"], min(item["limit_tokens"], GRAPH_TOKENS), reference.stop_tokens)
        for item in select_graph_items(reference)
    ]
    return OwnAnswers(generations, float(np.abs(logits - reference.logits[rows]).max()))


def select_graph_items(reference: Reference) -> list[Mapping[str, Any]]:
    """Return what both the runtime and the interpreter are asked."""
    return [*reference.document["prompts"], *reference.document["evaluation"][:GRAPH_PROMPTS]]


def prove_bundle(artifact: Path, own: OwnAnswers, reference: Reference, progress: Progress) -> dict[str, Any]:
    """Return everything that only the real runtime can show; what its graph shows is proven with the graph."""
    progress("opening the runtime", 0.3)
    with Runtime(artifact, has_byte_fallback(reference.tokenizer), count_cores()) as runtime:

        def answer(item: Mapping[str, Any]) -> Answer:
            return runtime.answer(fit_prompt(item, runtime), item["limit_tokens"])

        def is_alike(item: Mapping[str, Any]) -> bool:
            return runtime.encode(str(item["prompt"])) == list(item["tokens"])

        asked = Asked(answer, is_alike, runtime.decode)
        answers = ask_everything(asked, reference, progress)
        margin = 2 * SAMPLE_ALLOWANCE * own.sampled_error
        declared = {sequence[0] for sequence in runtime.stop_tokens if len(sequence) == 1}
        proven: dict[str, Any] = {
            "generation": compare_with_source(asked, answers, reference, margin),
            "graph_generation": compare_with_graph(asked, answers, own, reference),
            "context": describe_context(reference, fill_context(runtime, answers, reference)),
            "tokenizer": runtime.compare_tokenizer(reference.document["tokenizer_samples"]),
            "stop_tokens": {
                "expected": sorted(reference.stop_tokens),
                "declared": sorted(declared),
                "missing": len(reference.stop_tokens - declared),
            },
        }
        accuracy = measure_accuracy(answers, reference)
    return proven | ({"quality": accuracy} if accuracy else {})


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
    asked: Asked, answers: Sequence[Answer], own: OwnAnswers, reference: Reference
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
