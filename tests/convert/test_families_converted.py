"""A biased family and one with windows, converted and run; all others are converted by `tests/families`."""

from __future__ import annotations

import pytest

from tests.families.cases import find_case
from tests.families.conversion import TOLERANCE, Conversion, convert_case


@pytest.fixture(scope="module", params=["qwen2", "gemma3"])
def conversion(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    return convert_case(find_case(request.param), "reauthored", tmp_path_factory.mktemp(request.param))


def test_the_graph_computes_what_transformers_computes(conversion: Conversion) -> None:
    assert conversion.measure_parity() < TOLERANCE


# The window of the second is 24 tokens: long before the second prompt's end, its first tokens are out of sight.
@pytest.mark.parametrize("prompt_tokens", [12, 90])
def test_the_runtime_says_what_transformers_says(conversion: Conversion, prompt_tokens: int) -> None:
    text, expected = conversion.answer_in_runtime(prompt_tokens)
    assert len(expected) > 20
    assert text == expected
