"""Every family, by every engine that takes it: converted, compared with transformers, and run."""

from __future__ import annotations

import pytest

from tests.families.cases import CASES, Case
from tests.families.conversion import TOLERANCE, Conversion, convert_case
from workers.convert.architectures import FAMILIES

CONVERSIONS = [(case, engine) for case in CASES if case.is_converted for engine in FAMILIES[case.architecture].engines]


@pytest.fixture(scope="module", params=CONVERSIONS, ids=lambda pair: f"{pair[0].name}-{pair[1]}")
def conversion(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    case, engine = request.param
    return convert_case(case, engine, tmp_path_factory.mktemp(case.name))


def test_the_graph_computes_what_transformers_computes(conversion: Conversion) -> None:
    assert conversion.measure_parity() < TOLERANCE


@pytest.mark.parametrize("prompt_tokens", [12, 90])
def test_the_runtime_says_what_transformers_says(conversion: Conversion, prompt_tokens: int) -> None:
    text, expected = conversion.answer_in_runtime(prompt_tokens)
    assert len(expected) > 5
    assert text == expected


def test_every_family_is_converted() -> None:
    assert {case.architecture for case in CASES if case.is_converted} == set(FAMILIES)


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(isinstance(case, Case) for case in CASES)
