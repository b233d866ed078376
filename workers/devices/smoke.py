"""Smoke generation: what an artifact answers on a phone, beside what the host's own run of the same graph answered.

Owns which prompts are asked and how the answers are compared; `workers.verify.generation` owns the rules of that.
Asks nobody itself. Called by `workers.devices.phone`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from workers.verify.generation import Answer, Comparison, decode_tokens
from workers.verify.graph_answers import ANSWERS_FILE, read_graph_answers
from workers.verify.probe import Generation

#: What `reference` and the graph's `verify` leave, by name: all that the comparison needs.
NEEDED_FILES = ("reference.json", "tokenizer.json", ANSWERS_FILE)
#: The graph's proof keeps so many tokens of an answer; asked for more, an artifact says what nobody can compare.
KEPT_TOKENS = 8
#: Share of the logit range below which two machines may choose differently on equal graphs, as `verify` has it for two
#: runtimes on one; what is no CPU computes in half precision.
_TIE_RATIO = {"cpu": 1e-3}
_HALF_PRECISION_TIE_RATIO = 1e-2


@dataclass(frozen=True)
class Question:
    """One prompt, and what the graph answered on the host."""

    prompt: str
    #: Tokens that the source's tokenizer makes of it.
    prompt_tokens: int
    #: Most new tokens.
    limit_tokens: int
    expected: Generation


@dataclass(frozen=True)
class Answers:
    """What is known of an artifact's answers before a phone is asked."""

    questions: tuple[Question, ...]
    tokenizer: Tokenizer
    #: Logit margin at or below which two machines may rightly choose differently.
    near_tie_margin: float

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens as a runtime prints it."""
        return decode_tokens(self.tokenizer, list(tokens))

    def compare(self, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the figures `smoke`; `found` are answers as `reports.parse_answer` reads them, in order.

        A prompt that the artifact's tokenizer reads as another number of tokens is not compared.
        """
        comparison = Comparison(self.decode, self.near_tie_margin)
        for question, answer in zip(self.questions, found, strict=True):
            if answer["prompt_tokens"] != question.prompt_tokens:
                comparison.skip()
                continue
            given = Answer(answer["text"], answer["prompt_tokens"], answer["generated_tokens"])
            comparison.add(question.prompt, question.limit_tokens, question.expected, given)
        return comparison.describe()


def read_answers(folder: Path, count: int, backend: str, logit_range: float) -> Answers:
    """Read up to `count` questions of a folder that holds NEEDED_FILES; `logit_range`: of the source, from `verify`."""
    document = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    own = read_graph_answers(folder)
    questions = []
    for item, generation in zip(document["prompts"], own.generations, strict=False):
        # The long one would take as long as a benchmark.
        if not item.get("fills_context") and generation.tokens:
            limit_tokens = min(int(item["limit_tokens"]), KEPT_TOKENS)
            questions.append(Question(str(item["prompt"]), len(item["tokens"]), limit_tokens, generation))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    margin = _TIE_RATIO.get(backend, _HALF_PRECISION_TIE_RATIO) * logit_range
    return Answers(tuple(questions[:count]), tokenizer, margin)
