"""The `reference` step: what the source itself answers, computed once per checkpoint.

Owns the source's side of every comparison: teacher-forced logits on the probe, greedy generations with their
margins, exact match on `evaluation.jsonl`, token ids, stop tokens. Must not look at an artifact or judge a figure.
Run by `workers.runner` in a child; its files are read by `workers.verify.verify`, which needs no torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.errors import CheckpointInvalid, TokenizerUnsupported
from workers.steps import Progress, run_by_hand
from workers.verify import probe
from workers.verify.probe import Generation

#: Files that the step leaves behind.
LOGITS_FILE = "reference.npz"
ANSWERS_FILE = "reference.json"
TOKENIZER_FILE = "tokenizer.json"

#: Tokens generated for each fixed prompt, at most.
GENERATED_TOKENS = 12
#: Prompts of one batch; equal lengths only, so that no padding is needed.
BATCH_PROMPTS = 64
#: Room for a stop token and a little babble behind the longest answer.
ANSWER_EXTRA_TOKENS = 4


@dataclass(frozen=True)
class Source:
    """The checkpoint, opened with transformers in float32."""

    model: Any
    tokenizer: Any
    stop_tokens: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Return token ids as the model is meant to get them, its leading special tokens included."""
        return [int(token) for token in self.tokenizer(text, verbose=False)["input_ids"]]


def run(params: Mapping[str, Any], inputs: Mapping[str, Path], output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Answer the probe, the fixed prompts and the evaluation with the source; write `reference.npz` and `.json`.

    `params`: `context_length` in tokens, `prefill_lengths`. Raises `CheckpointInvalid` when `evaluation.jsonl`
    is not what it should be or the source answers with NaN, `TokenizerUnsupported` when the tokenizer has no
    portable form. Equal inputs give equal answers on the same CPU.
    """
    checkpoint = inputs["checkpoint"]
    context_length = int(params["context_length"])
    progress("opening the source", 0.0)
    evaluation = read_evaluation(checkpoint / "evaluation.jsonl")
    source = open_source(checkpoint)
    write_tokenizer(source.tokenizer, output_dir / TOKENIZER_FILE)
    with torch.inference_mode():
        progress("source logits on the probe", 0.1)
        short_cases = probe.build_short_cases(source.encode, evaluation, context_length)
        short_logits = [answer_case(source, case) for case in short_cases]
        progress("source logits up to the end of the context", 0.3)
        prompt = probe.fit_text(
            source.encode, context_length - probe.LONG_PROMPT_FREE_TOKENS, probe.write_long_text(evaluation)
        )
        windows = probe.plan_windows(params["prefill_lengths"], len(source.encode(prompt)), context_length)
        long = answer_long(source, prompt, windows, context_length)
        progress("source generations", 0.6)
        prompts = [long.describe(source.stop_tokens), *generate_prompts(source, context_length)]
        progress("source accuracy", 0.7)
        answers = answer_evaluation(source, evaluation, context_length)
    cases = [*short_cases, *probe.build_long_cases(long.tokens, windows)]
    logits = np.concatenate([*short_logits, long.select(windows)])
    require_finite(logits)
    np.savez(output_dir / LOGITS_FILE, logits=logits)
    document = {
        "context_length": context_length,
        "prefill_lengths": sorted({int(length) for length in params["prefill_lengths"]}),
        "vocabulary_size": int(logits.shape[-1]),
        "stop_tokens": sorted(source.stop_tokens),
        "cases": [case.to_json() for case in cases],
        "perplexity": probe.measure_perplexity(logits, cases),
        "prompts": prompts,
        "evaluation": answers,
        "tokenizer_samples": sample_tokenizer(source),
    }
    text = json.dumps(document, ensure_ascii=True, indent=1, sort_keys=True, allow_nan=False)
    (output_dir / ANSWERS_FILE).write_text(text + "\n", encoding="utf-8")
    return {"quality": describe_quality(document), "positions": len(logits), "prompts": len(prompts)}


def describe_quality(document: Mapping[str, Any]) -> dict[str, float | int]:
    """Return the source's own quality figures; exact match only where the checkpoint has an evaluation."""
    figures: dict[str, float | int] = {"perplexity": document["perplexity"]}
    answers = document["evaluation"]
    if answers:
        figures["exact_match"] = sum(answer["is_correct"] for answer in answers) / len(answers)
        figures["exact_match_count"] = len(answers)
    return figures


def read_evaluation(path: Path) -> list[tuple[str, str]]:
    """Return (prompt, answer) pairs, or none when the checkpoint has no evaluation.

    Raises `CheckpointInvalid` that names the line.
    """
    if not path.exists():
        return []
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            prompt, answer = item["prompt"], item["answer"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointInvalid(
                f'evaluation.jsonl line {number} is not {{"prompt": "...", "answer": "..."}}. Correct or remove it.',
                file="evaluation.jsonl",
                line=number,
            ) from error
        if not (isinstance(prompt, str) and isinstance(answer, str) and prompt):
            raise CheckpointInvalid(
                f"evaluation.jsonl line {number}: prompt and answer must be texts, the prompt not empty.",
                file="evaluation.jsonl",
                line=number,
            )
        pairs.append((prompt, answer))
    return pairs


def open_source(checkpoint: Path) -> Source:
    """Open model and tokenizer from local files, without remote code, in float32.

    Fused attention answers as eager attention does (the largest difference is below 1e-6 of the logit range) and
    takes less than half the time on a full context.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        attn_implementation="sdpa",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    model.eval()
    return Source(model, tokenizer, frozenset(find_stop_tokens(model, tokenizer)))


def find_stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a generation, as transformers decides: the generation config's, else the others'."""
    for value in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        stops = {int(token) for token in value} if isinstance(value, list | tuple) else {value} - {None}
        if stops:
            return stops
    return set()


def write_tokenizer(tokenizer: Any, path: Path) -> None:
    """Write the tokenizer in the one form that `verify` opens without transformers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerUnsupported(
            f"The tokenizer {type(tokenizer).__name__} has no tokenizer.json form. Save it as a fast tokenizer."
        )
    path.write_text(backend.to_str(), encoding="utf-8")


def answer_case(source: Source, case: probe.Case) -> probe.Floats:
    """Return the source's logits at the compared positions of one case: float32 [positions, vocab]."""
    kept = torch.tensor(list(case.positions))
    output = source.model(torch.tensor([case.tokens]), use_cache=False, logits_to_keep=kept)
    return np.asarray(output.logits[0].float().numpy(), dtype=np.float32)


@dataclass(frozen=True)
class LongAnswer:
    """A prompt that nearly fills the context, continued greedily; behind a stop token the prompt begins anew."""

    prompt: str
    prompt_tokens: int
    #: Prompt and continuation, as many as the context holds.
    tokens: list[int]
    #: Logits of the next token by position, at all positions asked for.
    rows: Mapping[int, probe.Floats]

    def select(self, windows: Sequence[probe.Window]) -> probe.Floats:
        """Return the rows of all windows, in order: float32 [positions, vocab]."""
        return np.stack([self.rows[position] for window in windows for position in window.positions])

    def describe(self, stop_tokens: frozenset[int]) -> dict[str, Any]:
        """Return the prompt with what a greedy generation that heeds stop tokens would be."""
        generated = self.tokens[self.prompt_tokens :]
        stop = next((place for place, token in enumerate(generated) if token in stop_tokens), None)
        kept = generated if stop is None else generated[: stop + 1]
        chosen = np.stack([self.rows[self.prompt_tokens - 1 + place] for place in range(len(kept))])
        generation = Generation(kept, probe.measure_margins(chosen).tolist(), stopped=stop is not None)
        tokens = self.tokens[: self.prompt_tokens]
        return {**describe_prompt(self.prompt, tokens, len(generated), generation), "fills_context": True}


def answer_long(source: Source, prompt: str, windows: Sequence[probe.Window], context_length: int) -> LongAnswer:
    """Run the prompt once and continue it from its cache; the rows of all windows come from that one run."""
    tokens = source.encode(prompt)
    count = len(tokens)
    kept = sorted({position for window in windows for position in window.positions if position < count} | {count - 1})
    output = source.model(torch.tensor([tokens]), use_cache=True, logits_to_keep=torch.tensor(kept))
    cache = output.past_key_values
    rows = dict(zip(kept, output.logits[0].float().numpy(), strict=True))
    require_finite(rows[count - 1])
    fresh: Iterator[int] | None = None
    for position in range(count, context_length):
        chosen = int(rows[position - 1].argmax()) if fresh is None else next(fresh)
        tokens.append(chosen)
        if chosen in source.stop_tokens and fresh is None:
            fresh = iter(tokens[:])
        output = source.model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
        rows[position] = output.logits[0, -1].float().numpy()
    return LongAnswer(prompt, count, tokens, rows)


def require_finite(logits: probe.Floats) -> None:
    """Raise `CheckpointInvalid` when the source answers with NaN or infinity."""
    if not np.isfinite(logits).all():
        raise CheckpointInvalid("The source answers the probe with NaN or infinite logits: its weights are damaged.")


def generate(source: Source, prompts: Sequence[Sequence[int]], limit_tokens: int) -> list[Generation]:
    """Continue each prompt greedily until a stop token or `limit_tokens`; prompts must be equally long."""
    results = [Generation([], [], stopped=False) for _ in prompts]
    live = list(range(len(prompts)))
    output = source.model(torch.tensor([list(prompt) for prompt in prompts]), use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    for step in range(limit_tokens):
        logits = output.logits[:, -1].float()
        best = torch.topk(logits, 2, dim=-1)
        tokens = best.indices[:, 0]
        margins = (best.values[:, 0] - best.values[:, 1]).tolist()
        for index in list(live):
            token = int(tokens[index])
            generation = results[index]
            generation.tokens.append(token)
            generation.margins.append(float(margins[index]))
            if token in source.stop_tokens:
                results[index] = Generation(generation.tokens, generation.margins, stopped=True)
                live.remove(index)
        if not live or step + 1 == limit_tokens:
            break
        output = source.model(tokens[:, None], past_key_values=cache, use_cache=True)
    return results


def generate_prompts(source: Source, context_length: int) -> list[dict[str, Any]]:
    """Continue the fixed prompts."""
    described = []
    for text in probe.PROMPTS:
        tokens = source.encode(text)
        if 0 < len(tokens) < context_length:
            limit_tokens = min(GENERATED_TOKENS, context_length - len(tokens))
            generation = generate(source, [tokens], limit_tokens)[0]
            described.append(describe_prompt(text, tokens, limit_tokens, generation))
    return described


def describe_prompt(text: str, tokens: Sequence[int], limit_tokens: int, generation: Generation) -> dict[str, Any]:
    """Return one prompt and its generation in the form that `reference.json` keeps."""
    return {
        "prompt": text,
        "tokens": list(tokens),
        "limit_tokens": limit_tokens,
        "generated": generation.tokens,
        "margins": generation.margins,
        "stopped": generation.stopped,
    }


def answer_evaluation(
    source: Source, evaluation: Sequence[tuple[str, str]], context_length: int
) -> list[dict[str, Any]]:
    """Answer every evaluation prompt greedily, under the token limit that every artifact gets as well."""
    if not evaluation:
        return []
    prompts = [source.encode(prompt) for prompt, _ in evaluation]
    longest_answer = max(len(source.encode(answer)) for _, answer in evaluation)
    limit_tokens = min(longest_answer + ANSWER_EXTRA_TOKENS, context_length - max(map(len, prompts)))
    if limit_tokens < 1:
        raise CheckpointInvalid(
            f"A prompt of evaluation.jsonl does not fit into the context of {context_length} tokens.",
            file="evaluation.jsonl",
        )
    generations: dict[int, Generation] = {}
    for batch in group_by_length(prompts):
        generations.update(zip(batch, generate(source, [prompts[i] for i in batch], limit_tokens), strict=True))
    described = []
    for index, (prompt, answer) in enumerate(evaluation):
        generation = generations[index]
        kept = generation.tokens[:-1] if generation.stopped else generation.tokens
        text = probe.first_line(source.tokenizer.decode(kept, skip_special_tokens=False))
        asked = describe_prompt(prompt, prompts[index], limit_tokens, generation)
        described.append({**asked, "answer": answer.strip(), "is_correct": text == answer.strip()})
    return described


def group_by_length(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return batches of indices of equally long prompts."""
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    return [
        indices[start : start + BATCH_PROMPTS]
        for indices in by_length.values()
        for start in range(0, len(indices), BATCH_PROMPTS)
    ]


def sample_tokenizer(source: Source) -> list[dict[str, Any]]:
    """Return texts with their ids (leading special tokens left out) and what the ids decode to."""
    samples = []
    for text in (*probe.TEXTS, *probe.PROMPTS):
        tokens = [int(token) for token in source.tokenizer(text, add_special_tokens=False)["input_ids"]]
        decoded = source.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        samples.append({"text": text, "tokens": tokens, "decoded": decoded})
    return samples


if __name__ == "__main__":
    sys.exit(run_by_hand(run, "Answer the probe with a checkpoint itself, in float32."))
