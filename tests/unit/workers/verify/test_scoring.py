from __future__ import annotations

import math

import pytest

from workers.verify import scoring
from workers.verify.scoring import Window


def encode(text: str) -> list[int]:
    """One token a character, behind a start token."""
    return [0, *map(ord, text)]


def window(tokens: int, loss: float, plain_loss: float | None = None) -> Window:
    return Window("x", list(range(tokens)), loss, plain_loss)


@pytest.mark.parametrize("text", [scoring.DEFAULT_TEXT, "短い文" * 200, "a" * 700, "one two\n\n three"])
@pytest.mark.parametrize("context_length", [16, 64, 2048])
def test_windows_cover_the_text_in_order_and_fit_the_context(text: str, context_length: int) -> None:
    windows = scoring.divide_text(encode, text, context_length, 10_000)
    assert "".join("".join(part for part, _ in windows).split()) == "".join(text.split())
    for part, tokens in windows:
        assert tokens == encode(part)
        assert 1 < len(tokens) < context_length
        assert len(tokens) <= scoring.WINDOW_TOKENS


@pytest.mark.parametrize("limit_tokens", [1, 20, 300])
def test_no_more_tokens_are_scored_than_asked(limit_tokens: int) -> None:
    windows = scoring.divide_text(encode, scoring.DEFAULT_TEXT, 2048, limit_tokens)
    scored = sum(len(tokens) - 1 for _, tokens in windows)
    assert limit_tokens - 8 <= scored <= limit_tokens


def test_a_context_of_two_tokens_scores_nothing() -> None:
    assert scoring.divide_text(encode, "text", 2, 100) == []


def test_perplexity_is_that_of_all_scored_tokens_together() -> None:
    windows = [window(5, 4 * math.log(3.0)), window(9, 8 * math.log(6.0))]
    figures = scoring.describe_perplexity([4 * math.log(4.0), 8 * math.log(8.0)], windows)
    assert figures["text_tokens"] == 12
    assert figures["text_perplexity"] == pytest.approx(4 ** (1 / 3) * 8 ** (2 / 3))
    assert figures["perplexity_increase"] == pytest.approx(1 / 3)


def test_windows_read_as_other_tokens_are_left_out_on_both_sides() -> None:
    windows = [window(5, 4.0), window(9, 80.0)]
    figures = scoring.describe_perplexity([4.0, None], windows)
    assert (figures["text_windows"], figures["text_windows_skipped"]) == (2, 1)
    assert figures["perplexity_increase"] == 0.0
    assert "text_perplexity" not in scoring.describe_perplexity([None, None], windows)


def test_windows_without_their_start_token_are_compared_with_the_source_without_it() -> None:
    figures = scoring.describe_perplexity([3.0], [window(5, 9.0, 3.0)], is_plain=True)
    assert figures["text_tokens"] == 3
    assert figures["text_perplexity"] == figures["source_text_perplexity"] == pytest.approx(math.e)
