"""The `reference` step: what the source itself answers, computed once per checkpoint.

Owns the source's side of every comparison: teacher-forced logits on the probe, greedy generations with their
margins, exact match on prompts with answers, losses on a text, conversations, token ids, stop tokens. Must not look at
an artifact or judge a figure.
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

from service import user_files
from service.errors import CheckpointInvalid, EdgeKilnError, EvaluationInvalid
from workers.convert.tokenizer_samples import SAMPLES as TOKENIZER_SAMPLES
from workers.steps import Progress, run_by_hand
from workers.verify import conversations, probe, scoring, source_conversations
from workers.verify.conversations import Rendered
from workers.verify.probe import Generation
from workers.verify.source import Source, describe_prompt, generate, open_source, require_finite, write_tokenizer

#: Files that the step leaves behind.
LOGITS_FILE = "reference.npz"
ANSWERS_FILE = "reference.json"
TOKENIZER_FILE = "tokenizer.json"

#: Tokens generated for each fixed prompt, at most.
GENERATED_TOKENS = 12
#: Prompts of one batch; equal lengths only, so that no padding is needed.
BATCH_PROMPTS = 64
#: Evaluation prompts that are put as conversations too.
REPLIED_EVALUATIONS = 4
#: Room for a stop token and a little babble behind the longest answer.
ANSWER_EXTRA_TOKENS = 4


def run(params: Mapping[str, Any], inputs: Mapping[str, Path], output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Answer everything that artifacts are asked with the source; write `reference.npz` and `reference.json`.

    `params`: `context_length` in tokens, `prefill_lengths`. `inputs`: `checkpoint`, and what the user uploaded as
    `evaluation` and `perplexity_text`. Raises `EvaluationInvalid` for uploads and `CheckpointInvalid` for an
    `evaluation.jsonl` that are not what they should be, `CheckpointInvalid` when the source answers with NaN,
    `ChatTemplateInvalid` when the chat template does not end, `TokenizerUnsupported` when the tokenizer has no
    portable form. Equal inputs give equal answers on the same CPU.
    """
    checkpoint = inputs["checkpoint"]
    context_length = int(params["context_length"])
    progress("opening the source", 0.0)
    evaluation = user_files.read_evaluation(find_upload(inputs, "evaluation"), checkpoint)
    text_upload = find_upload(inputs, "perplexity_text")
    own_text = user_files.read_perplexity_text(text_upload) if text_upload else None
    source = open_source(checkpoint)
    write_tokenizer(source.tokenizer, output_dir / TOKENIZER_FILE)
    asked = conversations.ask_alone([prompt for prompt, _ in evaluation[:REPLIED_EVALUATIONS]])
    rendered, declined = source_conversations.render_samples(source.tokenizer, [*conversations.SAMPLES, *asked])
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
        replies = reply_to_conversations(source, rendered, context_length)
        progress("source accuracy", 0.7)
        error = EvaluationInvalid if "evaluation" in inputs else CheckpointInvalid
        answers = answer_evaluation(source, evaluation, context_length, error)
        progress("source losses on the text", 0.9)
        text_windows = score_text(source, own_text, context_length)
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
        "text_windows": [window.to_json() for window in text_windows],
        "conversations": [each.to_json() for each in rendered],
        "conversations_declined": declined,
        "replies": replies,
        "tokenizer_restored": source.restored,
        "tokenizer_samples": sample_tokenizer(source),
    }
    # Keys keep their order: templates write messages as JSON.
    text = json.dumps(document, ensure_ascii=True, indent=1, allow_nan=False)
    (output_dir / ANSWERS_FILE).write_text(text + "\n", encoding="utf-8")
    return {
        "quality": describe_quality(document, text_windows),
        "positions": len(logits),
        "prompts": len(prompts),
        "conversations": len(rendered),
        "conversations_declined": declined,
    }


def find_upload(inputs: Mapping[str, Path], name: str) -> Path | None:
    """Return the file that the user uploaded under a name, if any."""
    return inputs[name] / user_files.UPLOAD_FILE if name in inputs else None


def describe_quality(document: Mapping[str, Any], text_windows: Sequence[scoring.Window]) -> dict[str, float | int]:
    """Return the source's own quality figures; exact match only where there is an evaluation."""
    figures: dict[str, float | int] = {"perplexity": document["perplexity"]}
    if text_windows:
        losses = [window.loss for window in text_windows]
        figures["text_perplexity"] = scoring.measure_perplexity(losses, text_windows)
        figures["text_tokens"] = sum(window.scored_tokens for window in text_windows)
    answers = document["evaluation"]
    if answers:
        figures["exact_match"] = sum(answer["is_correct"] for answer in answers) / len(answers)
        figures["exact_match_count"] = len(answers)
    return figures


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


def answer_evaluation(
    source: Source, evaluation: Sequence[tuple[str, str]], context_length: int, error: type[EdgeKilnError]
) -> list[dict[str, Any]]:
    """Answer every evaluation prompt greedily, under the token limit that every artifact gets as well."""
    if not evaluation:
        return []
    prompts = [source.encode(prompt) for prompt, _ in evaluation]
    longest_answer = max(len(source.encode(answer)) for _, answer in evaluation)
    limit_tokens = min(longest_answer + ANSWER_EXTRA_TOKENS, context_length - max(map(len, prompts)))
    if limit_tokens < 1:
        longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
        raise error(
            f"Prompt {longest + 1} of the evaluation has {len(prompts[longest])} tokens and does not fit into the "
            f"context of {context_length} together with an answer. Shorten it, or ask for a longer context.",
            prompt=longest + 1,
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


def score_text(source: Source, own_text: str | None, context_length: int) -> list[scoring.Window]:
    """Return the windows of the user's text, or of ours, with the source's losses.

    Raises `EvaluationInvalid` when the user's text is too short to say anything.
    """
    limit_tokens = scoring.DEFAULT_SCORED_TOKENS if own_text is None else scoring.MAX_SCORED_TOKENS
    text = scoring.DEFAULT_TEXT if own_text is None else own_text
    divided = scoring.divide_text(source.encode, text, context_length, limit_tokens)
    scored_tokens = sum(len(tokens) - 1 for _, tokens in divided)
    if own_text is not None and scored_tokens < scoring.MIN_SCORED_TOKENS:
        raise EvaluationInvalid(
            f"The text for perplexity has {scored_tokens} tokens to score; at least {scoring.MIN_SCORED_TOKENS} are "
            "needed to say anything. Upload a longer one.",
            scored_tokens=scored_tokens,
        )
    windows = []
    for part, tokens in divided:
        plain = source.encode_plain(part)
        has_start = len(plain) > 1 and tokens[1:] == plain
        plain_loss = source.measure_loss(plain) if has_start else None
        windows.append(scoring.Window(part, tokens, source.measure_loss(tokens), plain_loss))
    return windows


def reply_to_conversations(source: Source, rendered: Sequence[Rendered], context_length: int) -> list[dict[str, Any]]:
    """Continue some of the conversations, under the limit that the runtime gets too; none that asks for the date.

    The start token stands in front as before every prompt, whether the template writes it or not: the runtime puts it.
    """
    replies = []
    for each in rendered:
        tokens = source.add_start(source.encode_plain(each.text))
        is_asked = each.name in conversations.REPLIED or each.name.startswith(conversations.ALONE)
        if is_asked and len(tokens) + GENERATED_TOKENS <= context_length and not each.has_date:
            generation = generate(source, [tokens], GENERATED_TOKENS)[0]
            replies.append({"name": each.name, **describe_prompt(each.text, tokens, GENERATED_TOKENS, generation)})
    return replies


def sample_tokenizer(source: Source) -> list[dict[str, Any]]:
    """Return texts with their ids (leading special tokens left out) and what the ids decode to."""
    samples = []
    for text in (*probe.TEXTS, *probe.PROMPTS, *TOKENIZER_SAMPLES):
        tokens = source.encode_plain(text)
        decoded = source.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        samples.append({"text": text, "tokens": tokens, "decoded": decoded})
    return samples


if __name__ == "__main__":
    sys.exit(run_by_hand(run, "Answer the probe with a checkpoint itself, in float32."))
