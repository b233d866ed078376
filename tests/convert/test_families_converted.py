"""A biased family and one with windows, from checkpoint to judged bundles; `tests/families` converts all others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.families.cases import find_case
from tests.families.conversion import fired_for_families, read_outcomes, submit
from tests.kiln import Kiln

CASES = ("qwen2", "gemma3")


@pytest.fixture(scope="module")
def kiln(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kiln]:
    with fired_for_families(tmp_path_factory.mktemp("families")) as kiln:
        yield kiln


@pytest.fixture(scope="module")
def jobs(kiln: Kiln) -> dict[str, str]:
    """A job of each case; they run side by side."""
    models = kiln.folder.parent / "models"
    asked = {"engines": ("reauthored",), "recipes": ("none", "dynamic_int8")}
    return {name: submit(kiln, find_case(name).write(models / name), find_case(name), **asked) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_every_gate_is_passed(name: str, kiln: Kiln, jobs: dict[str, str]) -> None:
    job = kiln.client.wait(jobs[name])
    outcomes = read_outcomes(find_case(name), job)
    assert {each.recipe: each.state for each in outcomes} == {"none": "succeeded", "dynamic_int8": "succeeded"}, job
    assert {each.engine for each in outcomes} == {"reauthored"}
    assert outcomes[0].error_ratio is not None
    # The gate allows a thousandth; every family measures a thousandth of that.
    assert outcomes[0].error_ratio < 1e-5
