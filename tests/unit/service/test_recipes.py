"""Recipes by name, a user's own among them, and what is refused before anything is converted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service import recipes
from service.errors import RecipeInvalid, RecipeUnfit, UnknownName
from service.recipes import (
    ENGINES,
    FORMATS,
    RECIPES,
    find_recipe,
    parse_own_recipe,
    require_divisible,
    require_runnable,
)
from service.requests import parse_request

MIXED = [dict(entry) for entry in RECIPES["mixed_int4"].settings]


def static(operation: str) -> list[dict[str, Any]]:
    weights = {"num_bits": 8, "granularity": "CHANNELWISE"}
    config = {"activation_tensor_config": {"num_bits": 8, "symmetric": False}, "weight_tensor_config": weights}
    return [{"regex": ".*", "operation": operation, "op_config": {**config, "compute_precision": "INTEGER"}}]


def own(document: Any) -> recipes.Recipe:
    return find_recipe("mine", {"mine": parse_own_recipe("mine", document)})


def test_own_recipes_are_found_beside_the_canonical_ones() -> None:
    settings = {"mine": parse_own_recipe("mine", MIXED)}
    assert list(find_recipe("mine", settings).settings) == MIXED
    assert find_recipe("dynamic_int8", settings) is RECIPES["dynamic_int8"]
    with pytest.raises(UnknownName, match="Did you mean 'mine'"):
        find_recipe("min", settings)
    with pytest.raises(UnknownName):
        find_recipe("mine")


@pytest.mark.parametrize("name", ["none", "dynamic_int8", "", "Mine", "4bit", "my-recipe", "m" * 41, "../x", "a\n"])
def test_names_that_own_recipes_cannot_have(name: str) -> None:
    with pytest.raises(RecipeInvalid, match="cannot name an own recipe"):
        parse_own_recipe(name, MIXED)


def test_calibration_is_needed_for_activations_alone() -> None:
    assert not recipes.needs_calibration("dynamic_int4")
    assert recipes.needs_calibration("mine", {"mine": parse_own_recipe("mine", static("FULLY_CONNECTED"))})


@pytest.mark.parametrize("operation", ["*", "INPUT", "OUTPUT", "BATCH_MATMUL", "ADD"])
def test_static_settings_that_no_runtime_takes_are_refused(operation: str) -> None:
    with pytest.raises(
        RecipeUnfit, match=r"'mine' cannot run as litertlm from the engine auto: .* Ask for "
    ) as refusal:
        require_runnable(own(static(operation)), ["auto"], ["litertlm"])
    assert refusal.value.details["operations"] == [operation]
    assert (refusal.value.details["engines"], refusal.value.details["formats"]) == (["auto"], ["litertlm"])


def test_a_request_with_such_settings_is_refused_whole() -> None:
    request = {"source": {"kind": "hub", "repo": "owner/name"}, "own_recipes": {"mine": static("*")}}
    with pytest.raises(RecipeUnfit):
        parse_request({**request, "recipes": ["dynamic_int8", "mine"]})
    with pytest.raises(RecipeInvalid, match="'mine' cannot be used"):
        parse_request({**request, "own_recipes": {"mine": [{"regex": "("}]}, "recipes": ["mine"]})


def test_recipes_are_described_with_what_they_need() -> None:
    described = {each["name"]: each for each in recipes.describe_recipes()}
    assert list(described) == list(RECIPES)
    assert described["dynamic_int4_block64"]["block_sizes"] == [64]
    assert described["static_int16"]["needs_calibration"]
    assert described["none"]["settings"] == []
    assert json.loads(json.dumps(described)) == described


def test_everything_else_runs_from_every_engine_in_every_format() -> None:
    for recipe in (*RECIPES.values(), own(MIXED), own(static("FULLY_CONNECTED"))):
        require_runnable(recipe, ENGINES, FORMATS)


def test_blocks_divide_rows_or_the_recipe_is_refused_with_those_that_do() -> None:
    rows = {"the embedding": 192, "mlp.down_proj": 512}
    require_divisible(RECIPES["dynamic_int4_block64"], rows)
    require_divisible(RECIPES["dynamic_int4"], {"the embedding": 7})
    with pytest.raises(RecipeUnfit, match="blocks of 128, and those of the embedding have 192 values") as refusal:
        require_divisible(RECIPES["dynamic_int4_block128"], rows)
    assert "Ask for dynamic_int4_block32 or dynamic_int4_block64 or" in refusal.value.message
    assert refusal.value.details["row_length"] == 192
