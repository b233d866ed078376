from __future__ import annotations

from collections.abc import Sequence

import pytest

from workers.verify.generation import Answer, Comparison
from workers.verify.probe import Generation


def decode(tokens: Sequence[int]) -> str:
    """Token 0 is `a`, 1 is `b` and so on; 26 is half a character, 27 completes it."""
    spelled = "".join("\ufffd" if token == 26 else "é" if token == 27 else chr(97 + token) for token in tokens)
    return spelled.replace("\ufffdé", "é")


def generation(tokens: list[int], margins: list[float] | None = None, stopped: bool = False) -> Generation:
    return Generation(tokens, margins or [5.0] * len(tokens), stopped)


def compare(expected: Generation, answer: Answer, near_tie_margin: float = 0.1) -> dict[str, object]:
    comparison = Comparison(decode, near_tie_margin)
    comparison.add("prompt", 8, expected, answer)
    return comparison.describe()


def test_equal_answer_matches_fully() -> None:
    figures = compare(generation([0, 1, 2]), Answer("abc", 4, 3))
    assert (figures["match_ratio"], figures["tokens_compared"]) == (1.0, 3)
    assert "first_divergence" not in figures


def test_divergence_names_prompt_token_and_margin() -> None:
    figures = compare(generation([0, 1, 2, 3], [5, 5, 4, 5]), Answer("abxx", 4, 4))
    assert figures["match_ratio"] == 0.5
    assert figures["first_divergence"] == {"prompt": "prompt", "token": 2, "margin": 4}


def test_nothing_behind_a_near_tie_is_compared() -> None:
    figures = compare(generation([0, 1, 2], [5, 0.1, 5]), Answer("axy", 4, 3))
    assert (figures["match_ratio"], figures["tokens_compared"]) == (1.0, 1)


def test_match_stays_missing_when_near_ties_left_nothing() -> None:
    assert "match_ratio" not in compare(generation([0], [0.05]), Answer("a", 4, 1))


def test_leading_blank_does_not_count_and_half_a_character_does_not_either() -> None:
    assert compare(generation([0, 26]), Answer(" a", 4, 2))["match_ratio"] == 1.0
    assert compare(generation([0, 26, 27]), Answer("aé", 4, 3))["match_ratio"] == 1.0


@pytest.mark.parametrize(("generated_tokens", "missed"), [(3, 0), (8, 1)])
def test_answer_that_runs_on_behind_a_certain_stop_has_missed_it(generated_tokens: int, missed: int) -> None:
    figures = compare(generation([0, 1, 9], stopped=True), Answer("ab", 4, generated_tokens))
    assert (figures["stops_expected"], figures["stops_missed"], figures["match_ratio"]) == (1, missed, 1.0)


def test_stop_is_not_expected_where_it_is_a_near_tie_or_the_answer_went_astray() -> None:
    tie = compare(generation([0, 1, 9], [5, 5, 0.01], stopped=True), Answer("abcdefgh", 4, 8))
    astray = compare(generation([0, 1, 9], stopped=True), Answer("axcdefgh", 4, 8))
    assert tie["stops_expected"] == astray["stops_expected"] == 0


def test_stop_at_the_last_allowed_token_cannot_be_missed() -> None:
    figures = compare(generation([0, 1, 2, 3, 4, 5, 6, 9], stopped=True), Answer("abcdefgh", 4, 8))
    assert (figures["stops_expected"], figures["stops_missed"]) == (0, 0)


def test_cut_answer_is_compared_only_as_far_as_it_goes() -> None:
    figures = compare(generation([0, 1, 2, 3]), Answer("ab", 4, 2, is_cut=True))
    assert (figures["tokens_compared"], figures["match_ratio"], figures["answers_cut"]) == (2, 1.0, 1)


def test_skipped_prompts_are_counted() -> None:
    comparison = Comparison(decode, 0.1)
    comparison.skip()
    figures = comparison.describe()
    assert figures["prompts_skipped"] == 1
    assert "match_ratio" not in figures
