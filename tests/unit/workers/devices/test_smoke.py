"""Smoke generation: which prompts are asked, and what a comparison of answers says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from workers.devices.smoke import Answers, read_answers
from workers.verify.verify import GRAPH_TOKENS

WORDS = ("<unk>", "the", "kiln", "is", "warm", "cold")


def write_answers(folder: Path, *generations: list[int], margins: float = 5.0) -> None:
    """Write what `reference` and `verify` leave: prompts of two tokens, the last of which fills the context."""
    prompts = [
        {"prompt": f"prompt {number}", "tokens": [1, 2], "limit_tokens": 16, "fills_context": number == 2}
        for number in range(len(generations))
    ]
    (folder / "reference.json").write_text(json.dumps({"prompts": prompts}))
    told = [{"tokens": tokens, "margins": [margins] * len(tokens), "stopped": False} for tokens in generations]
    graph = {"graph_digest": "0" * 64, "max_abs_error": 9.0, "text_losses": [], "generations": told}
    (folder / "graph.json").write_text(json.dumps(graph))
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def answer(text: str, prompt_tokens: int = 2, generated_tokens: int = 4) -> dict[str, Any]:
    return {"text": text, "prompt_tokens": prompt_tokens, "generated_tokens": generated_tokens}


@pytest.fixture
def answers(tmp_path: Path) -> Answers:
    write_answers(tmp_path, [1, 2, 3, 4], [1, 2, 3, 4])
    return read_answers(tmp_path, 4, "cpu", logit_range=10.0)


def test_the_same_words_match(answers: Answers) -> None:
    found = answers.compare([answer("the kiln is warm"), answer("the kiln is warm")])
    assert (found["match_ratio"], found["tokens_compared"], found["prompts"]) == (1.0, 8, 2)
    assert "first_divergence" not in found


def test_the_first_difference_is_told(answers: Answers) -> None:
    found = answers.compare([answer("the kiln is warm"), answer("the kiln is cold")])
    assert found["match_ratio"] == 7 / 8
    assert found["first_divergence"] == {"prompt": "prompt 1", "token": 3, "margin": 5.0}


def test_another_reading_of_the_prompt_is_not_compared(answers: Answers) -> None:
    found = answers.compare([answer("cold", prompt_tokens=3), answer("cold", prompt_tokens=3)])
    assert found["prompts_skipped"] == 2
    # Nothing compared is no match.
    assert "match_ratio" not in found


def test_the_prompt_that_fills_the_context_is_not_asked(tmp_path: Path) -> None:
    write_answers(tmp_path, [1], [2], [3], [4])
    found = read_answers(tmp_path, 9, "cpu", 10.0)
    assert [question.prompt for question in found.questions] == ["prompt 0", "prompt 1", "prompt 3"]
    assert {question.limit_tokens for question in found.questions} == {GRAPH_TOKENS}
    assert len(read_answers(tmp_path, 2, "cpu", 10.0).questions) == 2


def test_a_near_tie_may_go_either_way_sooner_in_half_precision(tmp_path: Path) -> None:
    write_answers(tmp_path, [1, 2, 3, 4], margins=0.05)
    wrong = answer("cold")
    assert read_answers(tmp_path, 1, "cpu", 10.0).compare([wrong])["match_ratio"] == 0.0
    assert read_answers(tmp_path, 1, "gpu", 10.0).compare([wrong])["tokens_compared"] == 0
