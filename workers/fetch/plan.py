"""The step `plan`: what the checkpoint is, and whether it can do what the job asks.

Owns the comparison of request and checkpoint, the defaults of lengths, and the facts that the rest of the job's
graph is written from. Reads headers, configuration and weights' exponents; never imports torch or transformers.
Run by `workers.runner` in a child without network.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.errors import RequestUnfit, TokenizerUnsupported
from service.recipes import ENGINES, FORMATS, require_known
from workers.convert.architectures import FAMILIES, Family
from workers.fetch.checkpoint import Checkpoint, read_checkpoint
from workers.steps import Progress, run_by_hand

#: Tokens of context when the job names none: what the field's exporters choose, and small enough for phones.
DEFAULT_CONTEXT_LENGTH = 1280
#: Tokens of the one prefill signature when the job names none.
DEFAULT_PREFILL_LENGTH = 128
#: Each signature is traced and lowered for itself, so that their number multiplies the conversion's time.
MAX_PREFILL_LENGTHS = 8
#: One token to prefill and one to decode.
MIN_CONTEXT_LENGTH = 2

_AUTO_REASONS = {
    "reauthored": "its graph is built from config.json, with a KV cache layout that the runtime reads",
    "traced": "it is the only engine that converts this architecture",
}


def run(params: Mapping[str, Any], inputs: Mapping[str, Path], output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Validate `inputs["checkpoint"]` against the request and return the facts.

    `params`: `engines`, `formats`, `prefill_lengths` (tokens, or null for one of min(128, half the context)),
    `context_length` (tokens, or null for min(the model's, 1280)). Writes no output. Raises `CheckpointInvalid`,
    `CheckpointUnsafe`, `ChatTemplateInvalid`, `ArchitectureUnsupported`, `RequestUnfit`, `TokenizerUnsupported`.
    """
    formats = [require_known("format", name, FORMATS) for name in params["formats"]]
    engines = [require_known("engine", name, ENGINES) for name in params["engines"]]
    checkpoint = read_checkpoint(inputs["checkpoint"], progress)
    resolved = {engine: _resolve_engine(engine, checkpoint.family) for engine in engines}
    context_length = _choose_context(params.get("context_length"), checkpoint)
    prefill_lengths = _choose_prefill(params.get("prefill_lengths"), context_length)
    _require_tokenizer(formats, checkpoint)
    shape, tokenizer = checkpoint.shape, checkpoint.tokenizer
    return {
        "architecture": checkpoint.family.architecture,
        "family": checkpoint.family.name,
        "engines": {asked: engine for asked, (engine, _) in resolved.items()},
        "engine_reasons": {asked: reason for asked, (_, reason) in resolved.items()},
        "prefill_lengths": prefill_lengths,
        "context_length": context_length,
        "model_context_length": shape.context_length,
        "parameters": checkpoint.parameters,
        "weights_bytes": checkpoint.weights_bytes,
        "weights_dtype": checkpoint.weights_dtype,
        "tokenizer": tokenizer.kind,
        "has_chat_template": checkpoint.has_chat_template,
        "has_evaluation": checkpoint.has_evaluation,
        "vocabulary_size": shape.vocabulary_size,
        "layers": shape.layers,
    }


def _resolve_engine(asked: str, family: Family) -> tuple[str, str]:
    """Return the engine that `asked` means for the family, and why."""
    if asked == "auto":
        engine = family.engines[0]
        return engine, f"auto chooses {engine} for {family.architecture}: {_AUTO_REASONS[engine]}"
    if asked in family.engines:
        return asked, "as asked"
    able = sorted(each.architecture for each in FAMILIES.values() if asked in each.engines)
    raise RequestUnfit(
        f"The engine {asked!r} does not convert {family.architecture}; ask for {' or '.join(family.engines)}. "
        f"It converts {', '.join(able)}.",
        engine=asked,
        architecture=family.architecture,
        supported=list(family.engines),
    )


def _choose_context(asked: int | None, checkpoint: Checkpoint) -> int:
    limit = checkpoint.shape.context_length
    if asked is None:
        return min(limit, DEFAULT_CONTEXT_LENGTH)
    if asked > limit:
        raise RequestUnfit(
            f"A context of {asked} tokens was asked for, but the model's is {limit} "
            f"(max_position_embeddings in config.json); ask for at most {limit}.",
            context_length=asked,
            model_context_length=limit,
        )
    if asked < MIN_CONTEXT_LENGTH:
        raise RequestUnfit(
            f"A context of {asked} tokens cannot hold a prompt and an answer; ask for at least {MIN_CONTEXT_LENGTH}.",
            context_length=asked,
        )
    return asked


def _choose_prefill(asked: list[int] | None, context_length: int) -> list[int]:
    """Return the prefill lengths, ascending and without repetition."""
    if asked is None:
        return [max(1, min(DEFAULT_PREFILL_LENGTH, context_length // 2))]
    lengths = sorted(set(asked))
    if not 1 <= len(lengths) <= MAX_PREFILL_LENGTHS:
        raise RequestUnfit(
            f"{len(lengths)} prefill lengths were asked for; ask for 1 to {MAX_PREFILL_LENGTHS}.",
            prefill_lengths=lengths,
        )
    if lengths[0] < 1:
        raise RequestUnfit(f"A prefill length of {lengths[0]} tokens is not positive.", prefill_length=lengths[0])
    if lengths[-1] > context_length:
        raise RequestUnfit(
            f"A prefill length of {lengths[-1]} tokens exceeds the context of {context_length}; "
            f"ask for prefill lengths of at most {context_length}, or for a larger context.",
            prefill_length=lengths[-1],
            context_length=context_length,
        )
    return lengths


def _require_tokenizer(formats: list[str], checkpoint: Checkpoint) -> None:
    obstacle = checkpoint.tokenizer.sentencepiece_obstacle
    if "task" in formats and obstacle is not None:
        raise TokenizerUnsupported(
            f"A .task bundle needs a SentencePiece tokenizer, and {obstacle}. Ask for litertlm instead, which carries "
            "tokenizer.json as it is.",
            format="task",
            file="tokenizer.json",
        )


if __name__ == "__main__":
    sys.exit(run_by_hand(run, "Check a checkpoint against a request and state the facts."))
