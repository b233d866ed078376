"""What the service knows of the quantizer is what the installed quantizer says, and nothing else gets through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import ai_edge_quantizer
import pytest
from ai_edge_quantizer import algorithm_manager, default_policy, qtyping, recipe
from ai_edge_quantizer.recipe_manager import RecipeManager

from service import recipe_settings
from service.errors import RecipeInvalid
from service.recipe_schema import parse_settings
from service.recipe_settings import ALGORITHMS, MODES, OPERATIONS
from service.recipes import RECIPES

POLICY = json.loads(default_policy.DEFAULT_JSON_POLICY)
SHIPPED = Path(ai_edge_quantizer.__file__).parent / "recipes"


def entry(operation: str = "FULLY_CONNECTED", **config: Any) -> dict[str, Any]:
    """Return an entry that the quantizer takes: int4, dynamic."""
    merged = {
        "weight_tensor_config": {"num_bits": 4, "granularity": "CHANNELWISE"},
        "compute_precision": "INTEGER",
        **config,
    }
    return {"regex": ".*", "operation": operation, "op_config": merged}


def take(*entries: dict[str, Any]) -> list[dict[str, Any]]:
    return parse_settings("mine", list(entries))


def load(settings: Any) -> list[dict[str, Any]]:
    """Return what the tool makes of settings."""
    manager = RecipeManager()
    manager.load_quantization_recipe(settings)
    return list(manager.get_quantization_recipe())


def test_operations_are_those_of_the_tool() -> None:
    assert {each.value for each in qtyping.TFLOperationName} == set(OPERATIONS)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (recipe_settings.Granularity, qtyping.QuantGranularity),
        (recipe_settings.Precision, qtyping.ComputePrecision),
        (recipe_settings.DataType, qtyping.TensorDataType),
    ],
)
def test_names_are_those_of_the_tool(ours: Any, theirs: Any) -> None:
    assert set(get_args(ours)) == {each.value for each in theirs}


def test_algorithms_quantize_what_the_tool_says() -> None:
    assert set(ALGORITHMS) == {each.value for each in algorithm_manager.AlgorithmName}
    for name, operations in ALGORITHMS.items():
        if name != recipe_settings.NO_QUANTIZE:
            assert {each.value for each in algorithm_manager.get_supported_ops(name)} == operations, name


def test_modes_are_the_policy_of_the_tool() -> None:
    assert {mode.name for mode in MODES} == set(POLICY["configs"])
    for mode in MODES:
        stated = POLICY["configs"][mode.name]
        weights, activation = stated["weight_tensor_config"], stated.get("activation_tensor_config")
        assert set(POLICY["ops_per_config"][mode.name]) == mode.operations, mode.name
        assert (weights["num_bits"], weights["dtype"]) == (mode.weight_bits, "INT")
        assert set(weights["granularity"]) == mode.granularities
        assert set(weights["symmetric"]) == mode.weight_symmetries
        assert (stated["explicit_dequantize"], stated["compute_precision"] == "FLOAT") == (mode.is_weight_only,) * 2
        if activation is None:
            assert mode.activation is None
        else:
            assert (activation["num_bits"], set(activation["symmetric"]), activation["dtype"]) == mode.activation
            assert activation["granularity"] == ["TENSORWISE"]


def test_calibration_is_needed_where_the_tool_needs_it() -> None:
    for each in RECIPES.values():
        manager = RecipeManager()
        manager.load_quantization_recipe([dict(item) for item in each.settings])
        assert each.needs_calibration == manager.need_calibration(), each.name


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("dynamic_int8", recipe.dynamic_wi8_afp32),
        ("dynamic_int4", recipe.dynamic_wi4_afp32),
        ("weight_only_int8", recipe.weight_only_wi8_afp32),
        ("weight_only_int4", recipe.weight_only_wi4_afp32),
    ],
)
def test_canonical_recipes_are_the_tools_own(name: str, theirs: Any) -> None:
    assert list(RECIPES[name].settings) == theirs()


@pytest.mark.parametrize("each", [each for each in RECIPES.values() if each.settings], ids=lambda each: each.name)
def test_canonical_recipes_are_in_canonical_form_and_taken_by_the_tool(each: Any) -> None:
    settings = [dict(item) for item in each.settings]
    assert parse_settings("mine", settings) == settings
    assert load(settings) == settings


@pytest.mark.parametrize(
    "path", [path for path in sorted(SHIPPED.glob("*.json")) if "litertlm" not in path.name], ids=lambda path: path.stem
)
def test_recipes_that_come_with_the_tool_are_taken(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    for item in document:
        weights = item.get("op_config", {}).get("weight_tensor_config", {})
        for name in ("algorithm_params", "block_size"):
            weights.pop(name, None)
    assert load(parse_settings("mine", document))


def test_defaults_are_written_out() -> None:
    (parsed,) = take(entry())
    assert parsed == {
        "regex": ".*",
        "operation": "FULLY_CONNECTED",
        "algorithm_key": "min_max_uniform_quantize",
        "op_config": {
            "weight_tensor_config": {"num_bits": 4, "symmetric": True, "granularity": "CHANNELWISE", "dtype": "INT"},
            "compute_precision": "INTEGER",
            "explicit_dequantize": False,
            "skip_checks": False,
            "min_weight_elements": 0,
        },
    }
    assert take(parsed) == [parsed]


def test_an_exception_may_stay_unquantized() -> None:
    exception = {"regex": "lm_head", "operation": "FULLY_CONNECTED", "algorithm_key": "no_quantize"}
    assert load(take(entry(), exception))
    with pytest.raises(RecipeInvalid, match="no entry quantizes anything"):
        take(exception)


INT8 = {"num_bits": 8, "symmetric": False}


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({}, "recipe: Input should be a valid list"),
        ([], "at least 1 item"),
        ([entry()] * 65, "at most 64 items"),
        (["dynamic"], "0: Input should be"),
        ([entry() | {"regex": "("}], "is no regular expression"),
        ([entry() | {"regex": ""}], "at least 1 character"),
        ([entry() | {"regex": "a" * 257}], "at most 256 characters"),
        ([entry() | {"regex": "(a+)+$"}], "may take for ever"),
        ([entry() | {"regex": "(a|a){1,9}"}], "may take for ever"),
        ([entry() | {"regex": ".*a.*b.*c.*d"}], "may take for ever"),
        ([entry() | {"regex": r"(a)\1"}], "may take for ever"),
        ([entry() | {"regex": "(?=a)"}], "may take for ever"),
        ([entry("FULLY_CONECTED")], "'FULLY_CONECTED' is no operation"),
        ([entry() | {"algorithm_key": "minmax"}], "'minmax' is no algorithm"),
        ([entry() | {"algorithm_key": []}], "0.algorithm_key"),
        ([entry() | {"note": "x"}], "0.note: Extra inputs"),
        ([entry(weight_tensor_config={"num_bits": 3})], "num_bits"),
        ([entry(weight_tensor_config={"num_bits": "4"})], "num_bits"),
        ([entry(weight_tensor_config={"num_bits": 4, "granularity": "BLOCKWISE_48"})], "granularity"),
        ([entry(weight_tensor_config={"num_bits": 4, "symmetric": 1})], "symmetric"),
        ([entry(compute_precision="DOUBLE")], "compute_precision"),
        ([entry(skip_checks=True)], "skip_checks"),
        ([entry(min_weight_elements=-1)], "min_weight_elements"),
        ([entry(explicit_dequantize=True)], "does not take 4 bit CHANNELWISE weights"),
        ([entry("SOFTMAX")], "does not take 4 bit CHANNELWISE weights"),
        ([entry(compute_precision="FLOAT", explicit_dequantize=True) | {"operation": "MUL"}], "for MUL"),
        (
            [
                entry(
                    weight_tensor_config={"num_bits": 4, "granularity": "BLOCKWISE_32"},
                    compute_precision="FLOAT",
                    explicit_dequantize=True,
                )
            ],
            "4 bit BLOCKWISE_32 weights",
        ),
        ([entry(weight_tensor_config={"num_bits": 4, "symmetric": False})], "does not take 4 bit"),
        ([entry("ADD", activation_tensor_config={"num_bits": 4})], "with 4 bit activations"),
        ([entry(activation_tensor_config={**INT8, "granularity": "CHANNELWISE"})], "with 8 bit activations"),
        ([entry() | {"algorithm_key": "float_casting"}], "float_casting needs weights of 16 bits"),
        ([entry("ADD") | {"algorithm_key": "GPTQ"}], "GPTQ does not quantize ADD"),
        ([entry() | {"op_config": None}], "needs an op_config"),
        ([entry() | {"algorithm_key": "no_quantize"}], "no_quantize takes no op_config"),
    ],
)
def test_what_the_tool_does_not_take_is_refused_with_its_place(document: Any, reason: str) -> None:
    with pytest.raises(RecipeInvalid, match="The recipe 'mine' cannot be used") as refusal:
        parse_settings("mine", document)
    assert reason in refusal.value.message
    assert refusal.value.details["problems"]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_a_combination_is_taken_exactly_where_the_tool_takes_it(mode: Any) -> None:
    weights = {"num_bits": mode.weight_bits, "granularity": sorted(mode.granularities)[0]}
    config: dict[str, Any] = {
        "weight_tensor_config": weights,
        "compute_precision": "FLOAT" if mode.is_weight_only else "INTEGER",
        "explicit_dequantize": mode.is_weight_only,
    }
    if mode.activation is not None:
        bits, symmetries, dtype = mode.activation
        config["activation_tensor_config"] = {"num_bits": bits, "symmetric": min(symmetries), "dtype": dtype}
    for operation in sorted(OPERATIONS - {"*"}):
        document = [entry(operation, **config)]
        assert accepts(load, [{**document[0], "algorithm_key": "min_max_uniform_quantize"}]) == accepts(
            lambda settings: parse_settings("mine", settings), document
        ), operation


def accepts(reader: Callable[[Any], Any], document: Any) -> bool:
    try:
        reader(document)
    except (ValueError, RecipeInvalid):
        return False
    return True
