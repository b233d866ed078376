"""What the source and the artifact are both asked, and how their answers are compared. Pure numpy.

Owns the probe (texts, the teacher-forced token sequences and which positions are compared) and the figures of
parity. Must not run a model, read a file or judge a figure: thresholds live in `service.gates`. Called by
`workers.verify.reference`, which answers the probe with the source, and by `workers.verify.verify`, which
answers it with the artifact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Tokens = list[int]

#: Texts of several kinds; a tokenizer that knows only some of them still yields tokens for most.
TEXTS: tuple[str, ...] = (
    "The harbour was quiet at noon, and the ferry had not come back from the island yet.",
    "12+7=19, 40+2=42, 8*8=64 and 100-1=99.",
    "def area(width, height):\n    return width * height\n",
    "Q: Which month follows March?\nA: April",
    "Übermorgen fährt der Zug nach Köln; le café était déjà fermé.",
    '{"name": "kiln", "temperature_c": 1040, "open": false}',
)

#: Prompts whose greedy continuation is compared token by token.
PROMPTS: tuple[str, ...] = ("The harbour was", "12+7=", "def area(", "Q: Which month follows March?\nA:")

#: Tokens left free for generation behind the prompt that nearly fills the context.
LONG_PROMPT_FREE_TOKENS = 8

#: A source is sure where it finds its best token at least twice as likely as the second: a margin in nats.
SURE_MARGIN = math.log(2.0)

#: Rows compared after each prefill chunk and at the end of the context.
WINDOW_ROWS = 8
#: Most rows of one short sequence; also the longest sequence that is fed through `decode` alone, in tokens.
SHORT_TOKENS = 10
#: Evaluation sequences fed through `decode` alone; without an evaluation all texts are.
DECODED_SEQUENCES = 4
#: Evaluation prompts whose answers are compared row by row; enough to be most of all rows.
EVALUATION_SEQUENCES = 40
#: Evaluation pairs that the text of the long prompt repeats.
LONG_PROMPT_PAIRS = 64


@dataclass(frozen=True)
class Case:
    """One teacher-forced run: some tokens are prefilled, the rest goes through `decode` one by one."""

    #: Which figure the case counts for: `decode`, `evaluation`, a prefill signature or `context_end`.
    name: str
    #: All tokens of the sequence, those of the prefill first.
    tokens: Tokens
    #: How many tokens are prefilled; 0 starts with `decode`.
    prefill_tokens: int
    #: The length of the only prefill signature to use, or None for the chunks the runtime would choose.
    prefill_length: int | None

    @property
    def positions(self) -> range:
        """The positions whose logits are compared; row `p` predicts the token at `p + 1`."""
        return range(self.prefill_tokens, len(self.tokens))

    def to_json(self) -> dict[str, Any]:
        """Return the form that `reference.json` keeps."""
        return {
            "name": self.name,
            "tokens": self.tokens,
            "prefill_tokens": self.prefill_tokens,
            "prefill_length": self.prefill_length,
        }


@dataclass(frozen=True)
class Generation:
    """One greedy continuation, of the source or of the artifact."""

    #: New tokens, the stop token included when one was generated.
    tokens: list[int]
    #: How far each new token's logit stood above the second best.
    margins: list[float]
    #: Whether the last token is a stop token.
    stopped: bool


@dataclass(frozen=True)
class Window:
    """Rows to compare somewhere in the long sequence that fills the context."""

    name: str
    #: Token positions; what stands before the first is prefilled.
    positions: range
    #: As in `Case`.
    prefill_length: int | None


def build_short_cases(
    encode: Callable[[str], Tokens], evaluation: Sequence[tuple[str, str]], context_length: int
) -> list[Case]:
    """Return the cases that do not depend on the context: the same inputs give the same cases.

    `encode` maps text to token ids as the source's tokenizer does; `evaluation` holds (prompt, answer) pairs. Where
    there are any, they take the place of the texts, and most rows predict answers: on other text a model trained for
    one purpose answers noise, and the distance between two kinds of noise says little.
    """
    limit = min(SHORT_TOKENS, context_length)
    texts = [prompt + answer for prompt, answer in evaluation[:DECODED_SEQUENCES]] or TEXTS
    sequences = [encode(text)[:limit] for text in texts]
    cases = [Case("decode", tokens, 0, None) for tokens in sequences if len(tokens) > 1]
    for prompt, answer in evaluation[:EVALUATION_SEQUENCES]:
        tokens = encode(prompt + answer)
        # A tokenizer may join the end of the prompt with the answer.
        pairs = enumerate(zip(encode(prompt), tokens, strict=False))
        shared = next((place for place, (one, other) in pairs if one != other), min(len(encode(prompt)), len(tokens)))
        start = max(shared - 1, 0)
        if start < len(tokens) <= context_length:
            cases.append(Case("evaluation", tokens[: start + SHORT_TOKENS], start, None))
    return cases


def plan_windows(prefill_lengths: Iterable[int], prompt_tokens: int, context_length: int) -> list[Window]:
    """Return which rows of the long sequence are compared.

    Each prefill length is exercised twice, with a full chunk and with a padded one, each followed by up to
    `WINDOW_ROWS` decoded positions. The last window begins where the long prompt of `prompt_tokens` ends, so that it
    shows what is generated there, and ends exactly at the last position of the context.
    """
    windows = []
    for length in sorted(set(prefill_lengths)):
        full = min(length, context_length - 1)
        for start in sorted({full, max(1, full // 2 + 1)}):
            positions = range(start, min(start + WINDOW_ROWS, context_length))
            windows.append(Window(f"prefill_{length}", positions, length))
    return [*windows, Window("context_end", range(max(prompt_tokens - 1, 0), context_length), None)]


def build_long_cases(long: Tokens, windows: Sequence[Window]) -> list[Case]:
    """Return the windows over the tokens that fill the context as cases; `context_end` is the last."""
    return [
        Case(window.name, long[: window.positions.stop], window.positions.start, window.prefill_length)
        for window in windows
    ]


def first_line(text: str) -> str:
    """Return what an answer is compared by: the text up to the first newline, stripped."""
    return text.partition("\n")[0].strip()


def write_long_text(evaluation: Sequence[tuple[str, str]]) -> str:
    """Return what the long prompt repeats and ends with: evaluation pairs, the last without its answer.

    Without an evaluation it is plain text that most tokenizers know.
    """
    if not evaluation:
        return " ".join(TEXTS[:2])
    *pairs, (question, _) = evaluation[:LONG_PROMPT_PAIRS]
    return " ".join([*(prompt + answer for prompt, answer in pairs), question])


def fit_text(encode: Callable[[str], Tokens], limit_tokens: int, base: str) -> str:
    """Return `base`, repeated and cut in front: exactly `limit_tokens` tokens where characters allow it, never more."""
    tokens_each = max(1, len(encode(base)) // 2)
    text = " ".join([base] * (max(1, limit_tokens) // tokens_each + 2))
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if len(encode(text[-middle:])) <= limit_tokens:
            low = middle
        else:
            high = middle - 1
    text = text[-low:].lstrip()
    # Without the blank before it the first word may be other tokens, and more.
    while len(encode(text)) > limit_tokens:
        text = text[1:].lstrip()
    candidates = [text, *(more + text for more in ("!", "?!", "!?!", "7", "+7", "z ", "!z "))]
    return max((each for each in candidates if len(encode(each)) <= limit_tokens), key=lambda each: len(encode(each)))


def plan_chunks(tokens: int, prefill_lengths: Iterable[int]) -> list[tuple[int, int]]:
    """Return `(signature length, real tokens)` chunks that cover `tokens`, as LiteRT-LM divides a prompt.

    The largest signature is used while it fills up; the rest goes into the smallest one that holds it.
    """
    lengths = sorted(set(prefill_lengths))
    chunks: list[tuple[int, int]] = []
    rest = tokens
    while rest >= lengths[-1]:
        chunks.append((lengths[-1], lengths[-1]))
        rest -= lengths[-1]
    if rest:
        chunks.append((next(length for length in lengths if length >= rest), rest))
    return chunks


def measure_margins(logits: Floats) -> Floats:
    """Return how far the best logit stands above the second best.

    `logits`: float32 [positions, vocab]; result: float32 [positions].
    """
    best = np.partition(logits, -2, axis=-1)[:, -2:]
    return np.asarray(best[:, 1] - best[:, 0], dtype=np.float32)


def compare_logits(source: Floats, artifact: Floats) -> dict[str, float | int]:
    """Return the parity figures of two answers to the same positions.

    `source`, `artifact`: float32 [positions, vocab], all finite. A position is confident when the source's
    top-2 margin exceeds twice the largest absolute error; `top1_agreement_confident` is absent when none is.
    It is sure where that margin reaches `SURE_MARGIN`, whatever the error: `top1_agreement_sure` is what lossy
    artifacts can be asked for, as top-1 among near-ties says nothing.
    KL is KL(source || artifact) in nats. `max_abs_error_ratio` divides by the range of the source's logits.
    """
    if source.shape != artifact.shape or source.ndim != 2:
        raise ValueError(f"Logits of shapes {source.shape} and {artifact.shape} cannot be compared.")
    difference = np.abs(source.astype(np.float64) - artifact)
    max_abs_error = float(difference.max())
    logit_range = float(source.max() - source.min())
    agrees = source.argmax(axis=-1) == artifact.argmax(axis=-1)
    margins = measure_margins(source)
    confident = margins > 2 * max_abs_error
    sure = margins >= SURE_MARGIN
    divergence = measure_divergence(source, artifact)
    figures: dict[str, float | int] = {
        "max_abs_error": max_abs_error,
        "mean_abs_error": float(difference.mean()),
        "logit_range": logit_range,
        "top1_agreement": float(agrees.mean()),
        "confident_share": float(confident.mean()),
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
        "positions": len(source),
        "sure_positions": int(sure.sum()),
    }
    if logit_range > 0:
        figures["max_abs_error_ratio"] = max_abs_error / logit_range
    if confident.any():
        figures["top1_agreement_confident"] = float(agrees[confident].mean())
    if sure.any():
        figures["top1_agreement_sure"] = float(agrees[sure].mean())
    return figures


def measure_divergence(source: Floats, artifact: Floats) -> npt.NDArray[np.float64]:
    """Return KL(source || artifact) per position, in nats; never below 0."""
    source_log = log_softmax(source)
    divergence = np.sum(np.exp(source_log) * (source_log - log_softmax(artifact)), axis=-1)
    return np.asarray(np.maximum(divergence, 0.0))


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Return log probabilities over the last axis, in float64 so that small KL does not drown in rounding."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def measure_perplexity(logits: Floats, cases: Sequence[Case]) -> float:
    """Return the perplexity of the probe's own next tokens.

    `logits`: float32 [positions of all cases in order, vocab]. Positions without a next token do not count.
    """
    log_probabilities = log_softmax(logits)
    losses: list[float] = []
    row = 0
    for case in cases:
        for position in case.positions:
            if position + 1 < len(case.tokens):
                losses.append(-float(log_probabilities[row, case.tokens[position + 1]]))
            row += 1
    return math.exp(sum(losses) / len(losses))
