"""The `verify` step: the artifact, run in its real runtime, against what its source answered.

Owns the order of proof and the shape of the figures. Must not judge them (`service.gates` does) and must not import
torch: the source's answers come from `workers.verify.reference`. Run by `workers.runner` in a child. What does not
run, or is not what it claims to be, raises `VerificationFailed`; everything else becomes a figure.
"""

from __future__ import annotations

import json
import sys
import tempfile
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
from workers.verify.graph import Graph
from workers.verify.probe import Generation
from workers.verify.runtime import Runtime

#: Evaluation prompts that a bundle's runtime and its own graph are both asked, beside the fixed prompts.
GRAPH_PROMPTS = 16
#: Share of the logit range below which the runtime and the interpreter, on equal graphs, may choose differently.
GRAPH_TIE_RATIO = 1e-3


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
        contents.require_same_graph(artifact, graph_path)
    progress("opening the graph", 0.0)
    reference = load_reference(inputs["reference"])
    graph = Graph(graph_path)
    parity.require_stated_settings(graph, int(params["context_length"]), params["prefill_lengths"])
    logits = parity.answer_cases(graph, reference.cases, progress)
    figures: dict[str, Any] = {
        "format": kind,
        "recipe": str(params["recipe"]),
        "size_bytes": artifact.stat().st_size,
        "parity": parity.compare_cases(reference.cases, reference.logits, logits),
        "quality": {
            "perplexity": probe.measure_perplexity(logits, reference.cases),
            "source_perplexity": reference.document["perplexity"],
        },
    }
    if kind == "tflite":
        figures |= prove_graph(graph, reference, figures, progress)
    else:
        figures |= prove_bundle(artifact, graph, reference, figures, progress)
    return figures


def load_reference(folder: Path) -> Reference:
    """Read what the `reference` step wrote."""
    document = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    with np.load(folder / "reference.npz", allow_pickle=False) as arrays:
        logits = arrays["logits"]
    cases = [probe.Case(**case) for case in document["cases"]]
    return Reference(document, cases, logits, Tokenizer.from_file(str(folder / "tokenizer.json")))


def prove_graph(graph: Graph, reference: Reference, figures: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Return accuracy and generation figures of a bare graph, run in the interpreter."""

    def answer(item: Mapping[str, Any]) -> Answer:
        generation = graph.generate(item["tokens"], item["limit_tokens"], reference.stop_tokens)
        return describe_generation(reference.tokenizer, len(item["tokens"]), generation)

    asked = Asked(answer, lambda item: True, lambda tokens: decode_tokens(reference.tokenizer, tokens))
    return prove_answers(asked, reference, figures, progress)


def prove_bundle(
    artifact: Path, graph: Graph, reference: Reference, figures: Mapping[str, Any], progress: Progress
) -> dict[str, Any]:
    """Return everything that only the real runtime can show."""
    with (
        tempfile.TemporaryDirectory() as cache_dir,
        Runtime(artifact, Path(cache_dir), has_byte_fallback(reference.tokenizer)) as runtime,
    ):

        def answer(item: Mapping[str, Any]) -> Answer:
            return runtime.answer(fit_prompt(item, runtime), item["limit_tokens"])

        def is_alike(item: Mapping[str, Any]) -> bool:
            return runtime.encode(str(item["prompt"])) == list(item["tokens"])

        asked = Asked(answer, is_alike, runtime.decode)
        proven = prove_answers(asked, reference, figures, progress)
        progress("runtime against its own graph", 0.95)
        proven["graph_generation"] = compare_with_graph(asked, graph, reference)
        proven["tokenizer"] = runtime.compare_tokenizer(reference.document["tokenizer_samples"])
        declared = {sequence[0] for sequence in runtime.stop_tokens if len(sequence) == 1}
        proven["stop_tokens"] = {
            "expected": sorted(reference.stop_tokens),
            "declared": sorted(declared),
            "missing": len(reference.stop_tokens - declared),
        }
    return proven


def has_byte_fallback(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer spells characters it does not know as bytes, one token each."""
    return bool(json.loads(tokenizer.to_str())["model"].get("byte_fallback"))


def fit_prompt(item: Mapping[str, Any], runtime: Runtime) -> str:
    """Return the prompt; one that should nearly fill the context is measured with the runtime's own tokenizer."""
    text = str(item["prompt"])
    if item.get("fills_context") and len(runtime.encode(text)) != len(item["tokens"]):
        return probe.fit_text(runtime.encode, len(item["tokens"]))
    return text


def prove_answers(asked: Asked, reference: Reference, figures: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Ask the artifact everything the source was asked; return `quality`, `generation` and `context` figures.

    A prompt that the artifact's tokenizer reads differently counts for accuracy, which is what
    users see, but its tokens are not compared.
    """
    comparison = Comparison(asked.decode, 2 * figures["parity"]["max_abs_error"])
    document = reference.document
    items = [*document["prompts"], *document["evaluation"]]
    usable_tokens = correct = 0
    for number, item in enumerate(items):
        if number % 32 == 0:
            progress("generating", 0.65 + 0.3 * number / len(items))
        given = asked.answer(item)
        if asked.is_alike(item):
            comparison.add(item["prompt"], item["limit_tokens"], expected_generation(item), given)
        else:
            comparison.skip()
        if item.get("fills_context"):
            usable_tokens = max(usable_tokens, given.prompt_tokens + given.generated_tokens)
        if "answer" in item:
            correct += probe.first_line(given.text) == item["answer"]
    quality = dict(figures["quality"])
    if document["evaluation"]:
        count = len(document["evaluation"])
        quality["exact_match"] = correct / count
        quality["exact_match_count"] = count
        quality["source_exact_match"] = sum(item["is_correct"] for item in document["evaluation"]) / count
        quality["exact_match_drop"] = quality["source_exact_match"] - quality["exact_match"]
    stated = int(document["context_length"])
    context = {"stated_tokens": stated, "usable_tokens": usable_tokens, "unusable_tokens": stated - usable_tokens}
    return {"quality": quality, "generation": comparison.describe(), "context": context}


def compare_with_graph(asked: Asked, graph: Graph, reference: Reference) -> dict[str, Any]:
    """Return how the runtime's generations agree with the interpreter's on the very same graph, whatever the recipe."""
    margin = GRAPH_TIE_RATIO * float(reference.logits.max() - reference.logits.min())
    comparison = Comparison(asked.decode, margin)
    for item in [*reference.document["prompts"], *reference.document["evaluation"][:GRAPH_PROMPTS]]:
        if asked.is_alike(item):
            expected = graph.generate(item["tokens"], item["limit_tokens"], reference.stop_tokens)
            comparison.add(item["prompt"], item["limit_tokens"], expected, asked.answer(item))
        else:
            comparison.skip()
    return comparison.describe()


def expected_generation(item: Mapping[str, Any]) -> Generation:
    """Return what the source generated for one prompt of the reference."""
    return Generation(item["generated"], item["margins"], item["stopped"])


if __name__ == "__main__":
    sys.exit(run_by_hand(run, "Run an artifact against its source's answers."))
