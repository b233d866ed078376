"""A user's own recipe as JSON: its schema, and the reading of it. Pure.

Owns the shape of a document and the sentences about it; names and combinations belong to `service.recipe_settings`.
Called by `service.recipes`, which imports it only when there is a recipe to read.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, TypeAdapter, ValidationError, field_validator

from service.errors import RecipeInvalid
from service.recipe_settings import (
    ALGORITHMS,
    ALL_OPERATIONS,
    FLOAT_CASTING,
    MODES,
    NO_QUANTIZE,
    OPERATIONS,
    WEIGHT_OPERATIONS,
    DataType,
    Granularity,
    Mode,
    Precision,
    Settings,
)

MAX_ENTRIES = 64
MAX_REGEX_CHARACTERS = 256
#: A search tries every way to divide a name among them, and names have hundreds of characters.
MAX_UNBOUNDED_REPEATS = 3

_CONFIG = ConfigDict(frozen=True, extra="forbid")


class TensorConfig(BaseModel):
    """How one kind of tensor is stored."""

    model_config = _CONFIG
    num_bits: Literal[2, 4, 8, 16]
    symmetric: StrictBool = True
    granularity: Granularity = "TENSORWISE"
    dtype: DataType = "INT"


class OperationConfig(BaseModel):
    """How an operation is quantized."""

    model_config = _CONFIG
    activation_tensor_config: TensorConfig | None = None
    weight_tensor_config: TensorConfig
    compute_precision: Precision = "FLOAT"
    explicit_dequantize: StrictBool = False
    #: The tool would quantize what no kernel runs.
    skip_checks: Literal[False] = False
    min_weight_elements: StrictInt = Field(default=0, ge=0, le=2**31)


class Entry(BaseModel):
    """One setting: which operations it is for, and what happens to them."""

    model_config = _CONFIG
    #: Searched in the names of an operation's outputs.
    regex: str = Field(min_length=1, max_length=MAX_REGEX_CHARACTERS)
    operation: Annotated[str, Field(max_length=64)]
    algorithm_key: Annotated[str, Field(max_length=64)] = "min_max_uniform_quantize"
    op_config: OperationConfig | None = None

    @field_validator("regex")
    @classmethod
    def _bounded(cls, value: str) -> str:
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{value!r} is no regular expression: {error}") from None
        # Escaped characters and sets of characters repeat nothing.
        bare = re.sub(r"\[\^?\]?[^\]]*\]", "c", re.sub(r"\\\D", "c", value))
        unbounded = re.findall(r"[*+]|\{\d*,\}", bare)
        if len(unbounded) > MAX_UNBOUNDED_REPEATS or re.search(r"\)[*+?{]|\\\d|\(\?[^:]", bare):
            raise ValueError(
                f"{value!r} may take for ever: use at most {MAX_UNBOUNDED_REPEATS} of `*`, `+` and `{{n,}}`, and no "
                "repeated groups, references to groups or look-around"
            )
        return value

    @field_validator("operation")
    @classmethod
    def _operation(cls, value: str) -> str:
        if value not in OPERATIONS:
            raise ValueError(f"{value!r} is no operation that the quantizer knows")
        return value

    @field_validator("algorithm_key")
    @classmethod
    def _algorithm(cls, value: str) -> str:
        if value not in ALGORITHMS:
            raise ValueError(f"{value!r} is no algorithm; known: {', '.join(ALGORITHMS)}")
        return value


_ENTRIES: TypeAdapter[list[Entry]] = TypeAdapter(
    Annotated[list[Entry], Field(min_length=1, max_length=MAX_ENTRIES)], config=ConfigDict(title="recipe")
)


def parse_settings(name: str, document: Any) -> Settings:
    """Check a recipe's JSON whole and return its canonical form, every default written out.

    Raises `RecipeInvalid`, which names every entry and field that the quantizer would not take.
    """
    try:
        entries = _ENTRIES.validate_python(document)
    except ValidationError as error:
        problems = [
            {
                "field": ".".join(str(part) for part in item["loc"]) or "recipe",
                "message": item["msg"].removeprefix("Value error, "),
            }
            for item in error.errors(include_url=False, include_input=False, include_context=False)
        ]
    else:
        problems = [
            {"field": str(number), "message": message}
            for number, entry in enumerate(entries)
            if (message := _find_conflict(entry)) is not None
        ]
        if not problems and all(entry.algorithm_key == NO_QUANTIZE for entry in entries):
            problems = [{"field": "recipe", "message": "no entry quantizes anything; the recipe none does that"}]
    if problems:
        sentence = "; ".join(f"{problem['field']}: {problem['message']}" for problem in problems)
        raise RecipeInvalid(f"The recipe {name!r} cannot be used: {sentence}.", recipe=name, problems=problems)
    return [entry.model_dump(mode="json", exclude_none=True) for entry in entries]


def _find_conflict(entry: Entry) -> str | None:
    """Return why the quantizer takes none of what the entry names, or None where it takes some."""
    able = ALGORITHMS[entry.algorithm_key]
    if entry.algorithm_key == NO_QUANTIZE:
        return "no_quantize takes no op_config" if entry.op_config is not None else None
    if entry.op_config is None:
        return f"the algorithm {entry.algorithm_key} needs an op_config"
    asked = able if entry.operation == ALL_OPERATIONS else able & {entry.operation}
    if not asked:
        return f"the algorithm {entry.algorithm_key} does not quantize {entry.operation}"
    if entry.algorithm_key == FLOAT_CASTING:
        return _find_casting_conflict(entry.op_config)
    if not any(mode.operations & asked and _fits(entry.op_config, mode, asked) for mode in MODES):
        weights, activation = entry.op_config.weight_tensor_config, entry.op_config.activation_tensor_config
        described = f"{weights.num_bits} bit {weights.granularity} weights"
        if activation is not None:
            described += f" with {activation.num_bits} bit activations"
        return (
            f"the quantizer does not take {described}, compute_precision {entry.op_config.compute_precision} and "
            f"explicit_dequantize {str(entry.op_config.explicit_dequantize).lower()} for {entry.operation}"
        )
    return None


def _find_casting_conflict(config: OperationConfig) -> str | None:
    weights = config.weight_tensor_config
    if (
        config.activation_tensor_config is not None
        or config.compute_precision != "FLOAT"
        or (weights.num_bits, weights.dtype) != (16, "FLOAT")
    ):
        return "float_casting needs weights of 16 bits, dtype FLOAT, compute_precision FLOAT and no activations"
    return None


def _fits(config: OperationConfig, mode: Mode, asked: frozenset[str]) -> bool:
    weights, activation = config.weight_tensor_config, config.activation_tensor_config
    if (activation is None) != (mode.activation is None):
        return False
    if activation is not None and mode.activation is not None:
        bits, symmetries, dtype = mode.activation
        if (activation.num_bits, activation.dtype, activation.granularity) != (bits, dtype, "TENSORWISE"):
            return False
        if activation.symmetric not in symmetries:
            return False
    wanted = ("FLOAT", True) if mode.is_weight_only else ("INTEGER", False)
    if (config.compute_precision, config.explicit_dequantize) != wanted:
        return False
    if not asked & mode.operations & WEIGHT_OPERATIONS:
        return True
    return (
        (weights.num_bits, weights.dtype) == (mode.weight_bits, "INT")
        and weights.granularity in mode.granularities
        and weights.symmetric in mode.weight_symmetries
    )
