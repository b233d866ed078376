"""What ai-edge-quantizer can be asked for: names, and which of them go together. Pure; no third-party import.

Owns what `service` knows of the quantizer without importing it; `tests/unit/service/test_recipe_schema.py` holds every
name here against the installed tool. A recipe is a list of entries; where several fit an operation, the last one that
the tool supports counts. Read by `service.recipes` and `service.recipe_schema`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Settings = list[dict[str, Any]]

Granularity = Literal["TENSORWISE", "CHANNELWISE", "BLOCKWISE_32", "BLOCKWISE_64", "BLOCKWISE_128", "BLOCKWISE_256"]
Precision = Literal["INTEGER", "FLOAT"]
DataType = Literal["INT", "UINT", "FLOAT"]

ALL_OPERATIONS = "*"
EVERY_NAME = ".*"
_BLOCKWISE = "BLOCKWISE_"
NO_QUANTIZE = "no_quantize"
FLOAT_CASTING = "float_casting"

#: Operations whose weights are quantized; of all others only activations.
# fmt: off
WEIGHT_OPERATIONS = frozenset(
    {
        "FULLY_CONNECTED", "CONV_2D", "BATCH_MATMUL", "EMBEDDING_LOOKUP", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE"
    }
)

_ACTIVATIONS_INT8 = frozenset(
    {
        "ADD", "AVERAGE_POOL_2D", "BATCH_MATMUL", "CONCATENATION", "FULLY_CONNECTED", "CONV_2D", "CONV_2D_TRANSPOSE",
        "DEPTHWISE_CONV_2D", "GELU", "LOGISTIC", "MEAN", "MUL", "RESHAPE", "RSQRT", "SOFTMAX", "SPLIT",
        "STRIDED_SLICE", "SUB", "TANH", "TRANSPOSE", "INPUT", "OUTPUT", "SLICE", "SUM", "SELECT", "SELECT_V2",
        "DYNAMIC_UPDATE_SLICE", "STABLEHLO_COMPOSITE", "PAD", "SQUARED_DIFFERENCE", "MAX_POOL_2D", "RESIZE_BILINEAR",
        "RESIZE_NEAREST_NEIGHBOR", "GATHER_ND", "PACK", "UNPACK", "DIV", "BROADCAST_TO", "SQRT", "GATHER",
        "HARD_SWISH", "MAXIMUM", "PADV2", "REDUCE_MIN", "EQUAL", "NOT_EQUAL", "MIRROR_PAD", "SPACE_TO_DEPTH", "RELU"
    }
)
# fmt: on
_ACTIVATIONS_INT16 = _ACTIVATIONS_INT8 - {"SQUARED_DIFFERENCE", "HARD_SWISH", "SPACE_TO_DEPTH"}
_ACTIVATIONS_WITH_INT4 = frozenset({"FULLY_CONNECTED", "CONV_2D", "INPUT", "OUTPUT"})

#: All operations by name, and `*` for every one that the algorithm and the settings support.
OPERATIONS = frozenset({ALL_OPERATIONS, "CUSTOM_OP"}) | _ACTIVATIONS_INT8 | WEIGHT_OPERATIONS

_ROTATED = frozenset({"FULLY_CONNECTED", "EMBEDDING_LOOKUP"})
_UNIFORM = OPERATIONS - {ALL_OPERATIONS, "CUSTOM_OP"}

#: Algorithm -> operations that it quantizes.
ALGORITHMS: Mapping[str, frozenset[str]] = {
    NO_QUANTIZE: OPERATIONS - {ALL_OPERATIONS},
    "min_max_uniform_quantize": _UNIFORM,
    FLOAT_CASTING: WEIGHT_OPERATIONS - {"BATCH_MATMUL"},
    "dequantized_weight_recovery": frozenset({"FULLY_CONNECTED", "CONV_2D", "EMBEDDING_LOOKUP"}),
    "OCTAV": _UNIFORM,
    "HADAMARD_ROTATION": _ROTATED,
    "DECOMPOSED_HADAMARD_ROTATION": _ROTATED,
    "MSE": WEIGHT_OPERATIONS - {"BATCH_MATMUL"},
    "GPTQ": frozenset({"FULLY_CONNECTED"}),
    "OSCAR": frozenset({"FULLY_CONNECTED"}),
}

#: Algorithms that weigh weights by what flows through them, so that they need calibration whatever the activations.
DATA_ALGORITHMS = frozenset({"GPTQ", "OSCAR"})

_WHOLE: frozenset[str] = frozenset({"CHANNELWISE", "TENSORWISE"})
_BLOCKS: frozenset[str] = frozenset({"BLOCKWISE_32", "BLOCKWISE_64", "BLOCKWISE_128", "BLOCKWISE_256"})
_SYMMETRIC = frozenset({True})
_EITHER = frozenset({True, False})


@dataclass(frozen=True)
class Mode:
    """One row of the quantizer's policy: a combination of settings and the operations that take it."""

    name: str
    weight_bits: int
    operations: frozenset[str]
    granularities: frozenset[str] = _WHOLE
    weight_symmetries: frozenset[bool] = _SYMMETRIC
    #: Bits, symmetries and data type of activations that are quantized ahead of time; None: they stay float.
    activation: tuple[int, frozenset[bool], DataType] | None = None
    #: Whether weights are widened to float before use, by an operation of their own.
    is_weight_only: bool = False


#: The policy of the uniform algorithms.
MODES: tuple[Mode, ...] = (
    Mode("dynamic_wi8_afp32", 8, WEIGHT_OPERATIONS),
    Mode("dynamic_wi4_afp32", 4, frozenset({"FULLY_CONNECTED", "EMBEDDING_LOOKUP", "CONV_2D"})),
    Mode("dynamic_wi4_afp32_blockwise", 4, frozenset({"EMBEDDING_LOOKUP", "FULLY_CONNECTED"}), _BLOCKS),
    Mode("dynamic_wi2_afp32", 2, frozenset({"FULLY_CONNECTED", "EMBEDDING_LOOKUP", "CONV_2D"})),
    Mode("dynamic_wi2_afp32_blockwise", 2, frozenset({"FULLY_CONNECTED"}), _BLOCKS),
    Mode("static_wi8_ai16", 8, _ACTIVATIONS_INT16, activation=(16, _SYMMETRIC, "INT")),
    Mode("static_wi4_ai16", 4, _ACTIVATIONS_WITH_INT4, activation=(16, _SYMMETRIC, "INT")),
    Mode("static_wi8_ai8", 8, _ACTIVATIONS_INT8, activation=(8, _EITHER, "INT")),
    Mode("static_wi8_au8", 8, frozenset({"INPUT", "OUTPUT"}), activation=(8, frozenset({False}), "UINT")),
    Mode("static_wi4_ai8", 4, _ACTIVATIONS_WITH_INT4, activation=(8, _EITHER, "INT")),
    Mode("weightonly_wi8_afp32", 8, WEIGHT_OPERATIONS, weight_symmetries=_EITHER, is_weight_only=True),
    Mode(
        "weightonly_wi4_afp32",
        4,
        frozenset({"BATCH_MATMUL", "FULLY_CONNECTED", "EMBEDDING_LOOKUP", "CONV_2D"}),
        weight_symmetries=_EITHER,
        is_weight_only=True,
    ),
)


def has_static_activations(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry quantizes activations ahead of time."""
    return "activation_tensor_config" in entry.get("op_config", {})


def needs_calibration(settings: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether any entry needs to see what flows through the graph."""
    return any(has_static_activations(entry) or entry["algorithm_key"] in DATA_ALGORITHMS for entry in settings)


def find_granularity(entry: Mapping[str, Any]) -> str:
    """Return how many weights share a scale; empty where an entry quantizes none."""
    return str(entry.get("op_config", {}).get("weight_tensor_config", {}).get("granularity", ""))


def has_blocks(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry gives each block of a row a scale."""
    return find_granularity(entry).startswith(_BLOCKWISE)


def list_block_sizes(settings: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    """Yield the sizes of blocks that rows of all matrices are cut into, as far as settings alone can tell.

    An entry for some names only, or one that a later entry may take the place of, says nothing of a checkpoint.
    """
    for number, entry in enumerate(settings):
        replaced = any(later["operation"] in (entry["operation"], ALL_OPERATIONS) for later in settings[number + 1 :])
        if has_blocks(entry) and entry["regex"] == EVERY_NAME and not replaced:
            yield int(find_granularity(entry).removeprefix(_BLOCKWISE))
