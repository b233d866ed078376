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

from service.errors import CalibrationInvalid, RequestUnfit, TokenizerUnsupported
from service.recipes import ENGINES, FORMATS, find_recipe, require_divisible, require_known, require_runnable
from workers.convert.architectures import FAMILIES, Family
from workers.convert.architectures.parameters import list_row_lengths
from workers.fetch.checkpoint import Checkpoint, read_checkpoint
from workers.fetch.memory import predict_peaks
from workers.steps import Progress, run_by_hand

#: Tokens of context when the job names none: what the field's exporters choose, and small enough for phones.
DEFAULT_CONTEXT_LENGTH = 1280
#: Tokens of the one prefill signature when the job names none.
DEFAULT_PREFILL_LENGTH = 128
#: Each signature is traced and lowered for itself, so that their number multiplies the conversion's time.
MAX_PREFILL_LENGTHS = 8
#: One token to prefill and one to decode.
MIN_CONTEXT_LENGTH = 2


def run(params: Mapping[str, Any], inputs: Mapping[str, Path], output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Validate `inputs["checkpoint"]` against the request and return the facts.

    `params`: `engines`, `formats`, `prefill_lengths` (tokens, or null for one of at most min(128, half the context)),
    `context_length` (tokens, or null for at most min(the model's, 1280)). The context is a multiple of the largest
    prefill length: the runtime fills the cache in whole chunks, and a last chunk beyond it would be lost.
    `ignore_custom_code` lets checkpoints pass that name code beside a built-in class. `recipes` are what memory is
    predicted for; they, `own_recipes` and `calibration` (`kind`, or null) are held against the weights' shapes and the
    chat template. Writes no output. Raises `CheckpointInvalid`, `CheckpointUnsafe`, `ChatTemplateInvalid`,
    `ArchitectureUnsupported`, `RequestUnfit`, `TokenizerUnsupported`, `RecipeUnfit`, `CalibrationInvalid`.
    """
    formats = [require_known("format", name, FORMATS) for name in params["formats"]]
    engines = [require_known("engine", name, ENGINES) for name in params["engines"]]
    is_code_ignored = bool(params.get("ignore_custom_code"))
    checkpoint = read_checkpoint(inputs["checkpoint"], progress, is_code_ignored=is_code_ignored)
    resolved = {engine: _resolve_engine(engine, checkpoint.family) for engine in engines}
    context_length, prefill_lengths = _choose_lengths(
        params.get("context_length"), params.get("prefill_lengths"), checkpoint.shape.context_length
    )
    _require_tokenizer(formats, checkpoint)
    _require_recipes(params, [engine for engine, _ in resolved.values()], formats, checkpoint)
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
        "predicted_peak_anon_bytes": predict_peaks(
            shape,
            checkpoint.parameters,
            engines=sorted({engine for engine, _ in resolved.values()}),
            recipes=params.get("recipes", ()),
            formats=formats,
            prefill_lengths=prefill_lengths,
            context_length=context_length,
        ),
    }


def _resolve_engine(asked: str, family: Family) -> tuple[str, str]:
    """Return the engine that `asked` means for the family, and why."""
    if asked == "auto":
        engine = family.engines[0]
        return engine, f"auto chooses {engine} for {family.architecture}: {family.evidence}"
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


def _choose_lengths(
    asked_context: int | None, asked_prefill: list[int] | None, model_context: int
) -> tuple[int, list[int]]:
    """Return the context length, and the prefill lengths, ascending and without repetition."""
    if asked_context is not None:
        _check_context(asked_context, model_context)
    context_length = asked_context or min(model_context, DEFAULT_CONTEXT_LENGTH)
    if asked_prefill is not None:
        prefill_lengths = sorted(set(asked_prefill))
        _check_prefill(prefill_lengths, context_length)
    else:
        prefill_lengths = [_choose_prefill(context_length, must_divide=asked_context is not None)]
    largest = prefill_lengths[-1]
    if asked_context is None:
        return context_length - context_length % largest, prefill_lengths
    if asked_context % largest:
        below = asked_context - asked_context % largest
        nearest = [length for length in (below, below + largest) if MIN_CONTEXT_LENGTH <= length <= model_context]
        raise RequestUnfit(
            f"A context of {asked_context} tokens is no multiple of the largest prefill length, {largest}: the "
            f"runtime fills its cache in chunks of that size and would lose the last one. Ask for a context of "
            f"{' or '.join(map(str, nearest))} tokens, or for other prefill lengths.",
            context_length=asked_context,
            prefill_length=largest,
        )
    return context_length, prefill_lengths


def _check_context(asked: int, model_context: int) -> None:
    if asked > model_context:
        raise RequestUnfit(
            f"A context of {asked} tokens was asked for, but the model's is {model_context} "
            f"(max_position_embeddings in config.json); ask for at most {model_context}.",
            context_length=asked,
            model_context_length=model_context,
        )
    if asked < MIN_CONTEXT_LENGTH:
        raise RequestUnfit(
            f"A context of {asked} tokens cannot hold a prompt and an answer; ask for at least {MIN_CONTEXT_LENGTH}.",
            context_length=asked,
        )


def _choose_prefill(context_length: int, *, must_divide: bool) -> int:
    """Return the prefill length of a job that names none: short ones only where nothing else divides the context."""
    longest = max(1, min(DEFAULT_PREFILL_LENGTH, context_length // 2))
    if not must_divide:
        return longest
    divisors = [length for length in range(1, longest + 1) if context_length % length == 0]
    # A chunk of a few tokens makes prefill as slow as decode: let the user round the context instead.
    return divisors[-1] if divisors[-1] * 8 >= longest else longest


def _check_prefill(lengths: list[int], context_length: int) -> None:
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


def _require_tokenizer(formats: list[str], checkpoint: Checkpoint) -> None:
    obstacle = checkpoint.tokenizer.sentencepiece_obstacle
    if "task" in formats and obstacle is not None:
        raise TokenizerUnsupported(
            f"A .task bundle needs a SentencePiece tokenizer, and {obstacle}. Ask for litertlm instead, which carries "
            "tokenizer.json as it is.",
            format="task",
            file="tokenizer.json",
        )


def _require_recipes(params: Mapping[str, Any], engines: list[str], formats: list[str], checkpoint: Checkpoint) -> None:
    """Refuse recipes before anything is converted: what these engines and formats, or this checkpoint, cannot do."""
    own_recipes = params.get("own_recipes") or {}
    recipes = [find_recipe(name, own_recipes) for name in params.get("recipes", ())]
    for recipe in recipes:
        require_runnable(recipe, engines, formats)
        require_divisible(recipe, list_row_lengths(checkpoint.shape))
    calibrated = [recipe.name for recipe in recipes if recipe.needs_calibration]
    asked = params.get("calibration") or {}
    if calibrated and asked.get("kind") == "prompts" and not checkpoint.has_chat_template:
        raise CalibrationInvalid(
            f"The recipe {calibrated[0]!r} was to be calibrated with prompts, but the checkpoint has no chat template "
            "to render them with; upload plain text as the kind text.",
            kind="prompts",
        )


if __name__ == "__main__":
    sys.exit(run_by_hand(run, "Check a checkpoint against a request and state the facts."))
