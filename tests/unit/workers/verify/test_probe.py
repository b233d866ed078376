from __future__ import annotations

import math

import numpy as np
import pytest

from workers.verify import probe

BASE = probe.write_long_text([])


def encode(text: str) -> list[int]:
    """One token a character, behind a start token."""
    return [1, *(ord(character) % 90 + 2 for character in text)]


def random_logits(rows: int = 12, vocabulary: int = 30) -> probe.Floats:
    return np.random.default_rng(0).normal(0, 3, (rows, vocabulary)).astype(np.float32)


def test_equal_logits_have_no_error_and_every_position_is_confident() -> None:
    logits = random_logits()
    figures = probe.compare_logits(logits, logits.copy())
    assert figures["max_abs_error"] == figures["kl_mean"] == figures["kl_max"] == 0
    assert figures["top1_agreement"] == figures["top1_agreement_confident"] == figures["confident_share"] == 1
    assert figures["positions"] == 12


def test_error_is_told_relative_to_the_range_of_the_source() -> None:
    source = np.array([[0.0, 10.0], [4.0, 0.0]], dtype=np.float32)
    artifact = source + np.array([[0.0, -0.5], [0.0, 0.0]], dtype=np.float32)
    figures = probe.compare_logits(source, artifact)
    assert figures["max_abs_error"] == 0.5
    assert figures["max_abs_error_ratio"] == 0.05
    assert figures["logit_range"] == 10


def test_only_margins_beyond_twice_the_error_are_confident() -> None:
    source = np.array([[3.0, 0.0], [1.0, 0.0], [0.5, 0.0]], dtype=np.float32)
    artifact = np.array([[2.5, 0.0], [1.0, 0.0], [0.0, 0.4]], dtype=np.float32)
    figures = probe.compare_logits(source, artifact)
    assert figures["max_abs_error"] == 0.5
    assert figures["confident_share"] == pytest.approx(1 / 3)
    assert figures["top1_agreement"] == pytest.approx(2 / 3)
    assert figures["top1_agreement_confident"] == 1


def test_agreement_without_a_confident_or_sure_position_stays_missing() -> None:
    source = np.array([[0.1, 0.0]], dtype=np.float32)
    figures = probe.compare_logits(source, np.array([[0.0, 0.1]], dtype=np.float32))
    assert figures["confident_share"] == figures["sure_positions"] == 0
    assert "top1_agreement_confident" not in figures
    assert "top1_agreement_sure" not in figures


def test_sure_positions_are_those_where_the_source_finds_its_token_twice_as_likely() -> None:
    source = np.array([[0.70, 0.0], [0.68, 0.0], [5.0, 0.0]], dtype=np.float32)
    figures = probe.compare_logits(source, np.array([[0.7, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=np.float32))
    assert figures["sure_positions"] == 2
    assert figures["top1_agreement_sure"] == 0.5


def test_divergence_is_that_of_the_source_from_the_artifact() -> None:
    source = np.log(np.array([[0.5, 0.5]], dtype=np.float32))
    artifact = np.log(np.array([[0.9, 0.1]], dtype=np.float32))
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert probe.measure_divergence(source, artifact)[0] == pytest.approx(expected, rel=1e-5)
    assert probe.measure_divergence(source, artifact + 7)[0] == pytest.approx(expected, rel=1e-5)


def test_logits_of_different_shapes_are_not_compared() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        probe.compare_logits(random_logits(3), random_logits(4))


def test_perplexity_of_uniform_logits_is_the_size_of_the_vocabulary() -> None:
    cases = [probe.Case("decode", [3, 4, 5], 0, None), probe.Case("prefill_2", [3, 4, 5, 6], 2, 2)]
    assert probe.measure_perplexity(np.zeros((5, 7), dtype=np.float32), cases) == pytest.approx(7)


def test_perplexity_looks_at_the_next_token_of_each_row() -> None:
    cases = [probe.Case("decode", [0, 2, 1], 0, None), probe.Case("prefill_1", [0, 1, 2], 1, 1)]
    logits = np.full((5, 3), -1000.0, dtype=np.float32)
    for row, token in ((0, 2), (1, 1), (2, 0), (3, 2), (4, 0)):
        logits[row, token] = 0
    assert probe.measure_perplexity(logits, cases) == pytest.approx(1)


def build_all(evaluation: list[tuple[str, str]], lengths: list[int], context_length: int) -> list[probe.Case]:
    """Every case of a probe, with a long prompt that leaves eight tokens free."""
    long = list(range(context_length))
    windows = probe.plan_windows(lengths, context_length - 8, context_length)
    return [*probe.build_short_cases(encode, evaluation, context_length), *probe.build_long_cases(long, windows)]


def count_rows(cases: list[probe.Case], *names: str) -> int:
    return sum(len(case.positions) for case in cases if case.name in names)


@pytest.mark.parametrize("context_length", [32, 128, 1000])
def test_probe_exercises_every_signature_up_to_the_last_position(context_length: int) -> None:
    lengths = [8, 32]
    cases = build_all([("12+7=", "19")], lengths, context_length)
    assert {case.name for case in cases} == {"decode", "evaluation", "prefill_8", "prefill_32", "context_end"}
    assert all(case.positions and max(case.positions) < context_length for case in cases)
    assert all(len(case.tokens) <= context_length for case in cases)
    assert cases[-1].positions[-1] == context_length - 1
    for length in lengths:
        counts = {case.prefill_tokens for case in cases if case.prefill_length == length}
        assert min(length, context_length - 1) in counts
        assert min(counts) < length


def test_end_of_the_context_shows_what_follows_the_long_prompt() -> None:
    case = build_all([], [16], 256)[-1]
    assert (case.name, case.positions) == ("context_end", range(247, 256))


def test_probe_has_enough_positions_and_repeats_itself() -> None:
    cases = build_all([], [16, 64], 256)
    assert 64 <= sum(len(case.positions) for case in cases) <= 160
    assert cases == build_all([], [64, 16], 256)
    assert [probe.Case(**case.to_json()) for case in cases] == cases


@pytest.mark.parametrize("lengths", [[128], [16, 64]])
def test_most_positions_are_answers_where_there_is_an_evaluation(lengths: list[int]) -> None:
    cases = build_all([(f"{n}+7=", str(n + 7)) for n in range(10, 90)], lengths, 256)
    answers = count_rows(cases, "evaluation")
    assert answers > sum(len(case.positions) for case in cases) / 2
    assert count_rows(build_all([], lengths, 256), "evaluation") == 0


def test_rows_of_an_evaluation_begin_at_the_last_token_of_the_prompt() -> None:
    cases = build_all([("12+7=", "19")], [16], 64)
    assert cases[0].tokens == encode("12+7=19")
    (answer,) = (case for case in cases if case.name == "evaluation")
    assert (answer.tokens, answer.prefill_tokens) == (encode("12+7=19"), len(encode("12+7=")) - 1)


def test_rows_of_an_evaluation_begin_before_a_token_that_joins_prompt_and_answer() -> None:
    def encode_pairs(text: str) -> list[int]:
        return [ord(text[place]) * 256 + ord(text[place + 1 : place + 2] or " ") for place in range(0, len(text), 2)]

    (answer,) = (
        case for case in probe.build_short_cases(encode_pairs, [("12+7=", "19")], 64) if case.name == "evaluation"
    )
    assert (len(answer.tokens), answer.prefill_tokens) == (4, 1)


def test_evaluation_that_the_context_does_not_hold_is_no_case() -> None:
    assert count_rows(probe.build_short_cases(encode, [("1" * 64, "2")], 64), "evaluation") == 0


@pytest.mark.parametrize("limit_tokens", [3, 8, 50])
def test_fitted_text_has_no_more_tokens_where_a_blank_belongs_to_its_word(limit_tokens: int) -> None:
    def encode_words(text: str) -> list[int]:
        return [0] * (text.count(" long") + len(text.replace(" long", "")))

    assert len(encode_words(probe.fit_text(encode_words, limit_tokens, "long long"))) <= limit_tokens


def test_fitted_text_ends_as_its_base_does() -> None:
    assert probe.fit_text(encode, 30, "1+1=2 2+3=").endswith(" 1+1=2 2+3=")


def test_long_text_is_of_the_evaluation_where_there_is_one_and_ends_with_a_question() -> None:
    assert probe.write_long_text([("1+1=", "2"), ("2+3=", "5")]) == "1+1=2 2+3="
    assert probe.write_long_text([]).startswith(probe.TEXTS[0])


@pytest.mark.parametrize(
    ("tokens", "chunks"),
    [
        (1, [(8, 1)]),
        (8, [(8, 8)]),
        (9, [(32, 9)]),
        (32, [(32, 32)]),
        (40, [(32, 32), (8, 8)]),
        (73, [(32, 32), (32, 32), (32, 9)]),
    ],
)
def test_prompt_is_divided_as_the_runtime_divides_it(tokens: int, chunks: list[tuple[int, int]]) -> None:
    assert probe.plan_chunks(tokens, [32, 8]) == chunks


@pytest.mark.parametrize("limit_tokens", [2, 17, 120, 999])
def test_fitted_text_has_exactly_as_many_tokens_as_asked(limit_tokens: int) -> None:
    assert len(encode(probe.fit_text(encode, limit_tokens, BASE))) == limit_tokens


def test_fitted_text_never_has_more_tokens_than_asked() -> None:
    def encode_pairs(text: str) -> list[int]:
        return [0] * ((len(text) + 1) // 2 * 2)

    assert len(encode_pairs(probe.fit_text(encode_pairs, 33, BASE))) == 32


@pytest.mark.parametrize(("text", "line"), [("19", "19"), (" 19 \n20", "19"), ("\n19", ""), ("", "")])
def test_an_answer_is_its_first_line(text: str, line: str) -> None:
    assert probe.first_line(text) == line
