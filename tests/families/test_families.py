"""Every family by every engine that takes it: converted, quantized, bundled, run and judged; and the page of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.recipes import RECIPES
from tests.families.cases import CASES, Case
from tests.families.conversion import (
    Outcome,
    fired_for_families,
    list_recipes,
    read_outcomes,
    submit,
)
from tests.families.page import PAGE, render_page
from tests.kiln import Kiln
from workers.convert.architectures import FAMILIES

CONVERTED = [case for case in CASES if case.is_converted]
VARIANTS = [
    (case, engine, recipe)
    for case in CONVERTED
    for engine in FAMILIES[case.architecture].engines
    for recipes in list_recipes(case)
    for recipe in recipes
]

Key = tuple[str, str, str]


@pytest.fixture(scope="session")
def kiln(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kiln]:
    with fired_for_families(tmp_path_factory.mktemp("families")) as kiln:
        yield kiln


@pytest.fixture(scope="session")
def cases(request: pytest.FixtureRequest) -> list[Case]:
    """What this run was asked to convert."""
    chosen = {item.callspec.params["variant"][0].name for item in request.session.items if hasattr(item, "callspec")}
    return [case for case in CONVERTED if case.name in chosen]


@pytest.fixture(scope="session")
def outcomes(kiln: Kiln, cases: list[Case]) -> dict[Key, Outcome]:
    """What became of every variant; all jobs run side by side."""
    models = kiln.folder.parent / "models"
    folders = {case.name: case.write(models / case.name) for case in cases}
    jobs = [(case, submit(kiln, folders[case.name], case, recipes)) for case in cases for recipes in list_recipes(case)]
    return {
        (case.name, each.engine, each.recipe): each
        for case, job_id in jobs
        for each in read_outcomes(case, kiln.client.wait(job_id))
    }


@pytest.fixture(scope="session")
def measured(kiln: Kiln, cases: list[Case], outcomes: dict[Key, Outcome]) -> list[Outcome]:
    """The float variants of families that both engines convert, run again for speed once all else is done."""
    models = kiln.folder.parent / "models"
    measured = []
    for case in cases:
        if len(FAMILIES[case.architecture].engines) > 1:
            job_id = submit(kiln, models / case.name, case, ("none",), formats=("litertlm",), devices=("host",))
            measured += read_outcomes(case, kiln.client.wait(job_id))
    return measured


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"{variant[0].name}-{variant[1]}-{variant[2]}")
def test_a_variant_is_proven_or_loses_too_much(variant: tuple[Case, str, str], outcomes: dict[Key, Outcome]) -> None:
    case, engine, recipe = variant
    outcome = outcomes[case.name, engine, recipe]
    if outcome.state != "succeeded":
        assert RECIPES[recipe].is_lossy, outcome.describe()
        assert outcome.state == "refused", outcome.describe()
        assert outcome.missed, outcome.describe()
        # Few bits leave little of small random matrices; nothing else may be lost. Activations of few bits also tell
        # the kernels of the runtime from those of the interpreter.
        bounds = ("lossy_", "runtime_match") if RECIPES[recipe].needs_calibration else ("lossy_",)
        assert all(verdict["gate"].startswith(bounds) for verdict in outcome.missed), outcome.describe()


def test_auto_takes_the_engine_that_is_no_worse(measured: list[Outcome]) -> None:
    for first, second in zip(measured[::2], measured[1::2], strict=True):
        assert first.case == second.case
        assert (first.engine, second.engine) == FAMILIES[first.case.architecture].engines
        assert max(first.error_ratio or 1, second.error_ratio or 1) < 1e-5
        assert (first.size_bytes or 0) <= (second.size_bytes or 0)


def test_the_page_says_what_has_been_shown(
    cases: list[Case], outcomes: dict[Key, Outcome], measured: list[Outcome]
) -> None:
    page = render_page(list(outcomes.values()), measured)
    assert all(outcome.state in ("succeeded", "refused") for outcome in outcomes.values())
    assert all(outcome.decode_tokens_per_s for outcome in measured)
    # A run of some cases is no page.
    if len(cases) == len(CONVERTED):
        Path(PAGE).write_text(page, encoding="utf-8")
