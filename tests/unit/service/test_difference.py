"""What two measurements say of each other, and what they refuse to say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from service.difference import find_changes, find_ratio_interval, find_regressions
from service.errors import NotComparable
from tests.measured_play import CALM, measured


def scaled(factor: float) -> list[float]:
    return [sample * factor for sample in reversed(CALM)]


def words(one: Sequence[float], other: Sequence[float], **fields: Any) -> dict[str, str]:
    return {change.metric: change.verdict for change in find_changes(measured(one), measured(other, **fields))}


def test_the_words_follow_the_direction_of_each_metric() -> None:
    faster = words(CALM, scaled(1.2))
    assert (faster["decode_tokens_per_s"], faster["ttft_s"]) == ("faster", "faster")
    slower = words(CALM, scaled(0.8))
    assert (slower["decode_tokens_per_s"], slower["ttft_s"]) == ("slower", "slower")


def test_equals_are_called_so_only_where_the_samples_bear_it() -> None:
    assert words(CALM, scaled(1.0))["decode_tokens_per_s"] == "no difference"
    # Within what another hour does to the same phone.
    assert words(CALM, scaled(1.015))["decode_tokens_per_s"] == "no difference"
    wide = [100.0, 112.0, 90.0, 105.0, 94.0, 101.0]
    assert words(CALM, wide)["decode_tokens_per_s"] == "unclear"


def test_an_interval_worked_out_by_hand() -> None:
    # Logarithms 0, 1, 2 and 1, 2, 3: difference 1, standard error sqrt(2 / 3), t(4 degrees, 97.5 %) = 2.7764.
    found = find_ratio_interval([1.0, 2.718281828, 7.389056099], [2.718281828, 7.389056099, 20.085536923])
    assert found == pytest.approx(
        (2.718281828 ** (1 - 2.7764 * 0.81650), 2.718281828 ** (1 + 2.7764 * 0.81650)), rel=1e-3
    )
    assert find_ratio_interval([2.0] * 6, [3.0] * 6) == pytest.approx((1.5, 1.5))
    assert find_ratio_interval([1.0, 2.0], [1.0, 2.0]) is None


def test_rounds_that_ran_in_turns_are_compared_round_by_round() -> None:
    """What a round does to both cancels out: here rounds differ by a tenth, and the two by 4 % in each."""
    rounds = [100.0, 110.0, 91.0, 105.0, 95.0, 102.0]
    better = [1.04 * sample * (1 + 0.001 * number) for number, sample in enumerate(rounds)]
    one, other = measured(rounds), measured(better)
    alone = {change.metric: change for change in find_changes(one, other)}["decode_tokens_per_s"]
    assert alone.verdict == "unclear"
    turns = {"interleaved": {"with": "x"}}
    together = {change.metric: change for change in find_changes({**one, **turns}, {**other, **turns})}
    assert together["decode_tokens_per_s"].verdict == "faster"


def test_memory_is_one_reading() -> None:
    for size, word in ((100_000_000, "no difference"), (106_000_000, "larger"), (90_000_000, "smaller")):
        assert words(CALM, CALM, peak_anon_bytes=size)["peak_anon_bytes"] == word


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"verdict": "noisy"}, "candidate is noisy"),
        ({"device": {"kind": "virtual", "serial": "R5CT1"}}, "never mixed"),
        ({"device": {"kind": "host", "name": "host"}}, "never mixed"),
        ({"format": "task"}, "format differs"),
        ({"decode_tokens": 64}, "decode tokens differs"),
    ],
)
def test_what_cannot_be_compared_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(NotComparable, match=sentence):
        find_changes(measured(), measured(**fields))
    with pytest.raises(NotComparable):
        find_changes(measured(**fields), measured())


def test_regressions_are_what_is_worse_beyond_the_bar() -> None:
    entry = {"id": "step_1", "job_id": "job_1", "measured_at": None}

    def find(other: Sequence[float], **fields: Any) -> dict[str, str]:
        found = find_regressions((entry, measured()), measured(other, **fields), 0.10)
        return {each["metric"]: each["verdict"] for each in found}

    assert find(scaled(0.93)) == {}, "control: slower, within the bar"
    assert find(scaled(1.3)) == {}
    assert find(scaled(0.85)).keys() == {"decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s"}
    assert find(CALM, peak_anon_bytes=120_000_000) == {"peak_anon_bytes": "larger"}
    assert find(scaled(0.5), verdict="hot") == {}
