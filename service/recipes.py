"""What may be asked for: engines, recipes, formats, their names, and what cannot run where. Pure; no I/O.

Called by `service.api`, `service.cli`, `service.requests`, `service.ledger.plan`, and by `workers.fetch.plan` and
`workers.convert.quantize`, which apply a recipe's settings. What settings there are belongs to `recipe_settings`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service import recipe_settings
from service.errors import RecipeInvalid, RecipeUnfit, UnknownName
from service.recipe_settings import ALL_OPERATIONS, OPERATIONS, Settings

#: Artifact kinds and their file suffixes.
FORMATS: tuple[str, ...] = ("tflite", "task", "litertlm")

#: Engines a job may name; `auto` is resolved by the `plan` step.
ENGINES: tuple[str, ...] = ("auto", "reauthored", "traced")

#: Where a benchmark may run.
DEVICES: tuple[str, ...] = ("host",)

#: What a user's own recipe may be called.
OWN_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


@dataclass(frozen=True)
class Recipe:
    """How weights and activations are stored and computed."""

    #: Canonical name; wire format.
    name: str
    #: One line for people.
    description: str
    #: Whether weights lose precision; decides which default gates apply.
    is_lossy: bool = True
    #: What the quantizer is asked for, as `recipe_settings` has it; nothing leaves the graph as it is.
    settings: tuple[Mapping[str, Any], ...] = ()

    @property
    def needs_calibration(self) -> bool:
        """Whether the float graph must be run on text to know the ranges of activations."""
        return recipe_settings.needs_calibration(self.settings)

    @property
    def has_blocks(self) -> bool:
        """Whether any weights get a scale a block."""
        return any(map(recipe_settings.has_blocks, self.settings))

    @property
    def block_sizes(self) -> list[int]:
        """Numbers of values that share a scale; the rows of all matrices must be multiples of them. Ascending."""
        return sorted(set(recipe_settings.list_block_sizes(self.settings)))

    @property
    def constraint(self) -> str:
        """What the checkpoint or the request must bring, for people; empty where it is nothing."""
        parts = [f"rows in multiples of {size}" for size in self.block_sizes]
        return "; ".join([*parts, "calibration"] if self.needs_calibration else parts)


@dataclass(frozen=True)
class Obstacle:
    """Settings that some engines and formats cannot run, as measured."""

    #: Operations whose activations these settings quantize ahead of time.
    static_operations: frozenset[str]
    engines: frozenset[str]
    formats: frozenset[str]
    #: Follows "because".
    reason: str
    #: Follows "Ask for".
    instead: str


#: What the installed tools were seen to fail at (docs/decisions/0010-static-quantization.md).
OBSTACLES: tuple[Obstacle, ...] = (
    Obstacle(
        frozenset({"INPUT", "OUTPUT"}),
        frozenset(ENGINES),
        frozenset(FORMATS),
        "every signature would hold the KV cache in a scale of its own, while the runtime hands its bytes from one to "
        "the next",
        "settings without INPUT and OUTPUT: caches, masks and positions stay float32",
    ),
    Obstacle(
        OPERATIONS - {"FULLY_CONNECTED", "INPUT", "OUTPUT"},
        frozenset(ENGINES),
        frozenset(FORMATS),
        "outside of linear layers the runtime aborts at int8 activations, and no answer is left of int16 ones",
        "static settings of FULLY_CONNECTED alone, as static_int8 and static_int16 have them",
    ),
)


def _entry(operation: str, bits: int, granularity: str = "CHANNELWISE", **config: Any) -> dict[str, Any]:
    """Return one entry in canonical form; without more said it is a dynamic one."""
    merged = {"compute_precision": "INTEGER", "explicit_dequantize": False, **config}
    weights = {"num_bits": bits, "symmetric": True, "granularity": granularity, "dtype": merged.pop("dtype", "INT")}
    return {
        "regex": ".*",
        "operation": operation,
        "algorithm_key": merged.pop("algorithm_key", "min_max_uniform_quantize"),
        "op_config": {"weight_tensor_config": weights, "skip_checks": False, "min_weight_elements": 0, **merged},
    }


def _dynamic(*operations: str, bits: int, granularity: str = "CHANNELWISE") -> tuple[dict[str, Any], ...]:
    return tuple(_entry(operation, bits, granularity) for operation in operations)


def _weight_only(operation: str, bits: int) -> tuple[dict[str, Any], ...]:
    return (_entry(operation, bits, compute_precision="FLOAT", explicit_dequantize=True),)


def _casting(*operations: str) -> tuple[dict[str, Any], ...]:
    cast = {"algorithm_key": recipe_settings.FLOAT_CASTING, "dtype": "FLOAT"}
    widened = {"compute_precision": "FLOAT", "explicit_dequantize": True}
    return tuple(_entry(operation, 16, "TENSORWISE", **cast, **widened) for operation in operations)


def _static(activation_bits: int) -> tuple[dict[str, Any], ...]:
    # Kernels of int16 know no zero point.
    stored = {"num_bits": activation_bits, "symmetric": activation_bits == 16, "granularity": "TENSORWISE"}
    matrices = _entry("FULLY_CONNECTED", 8, activation_tensor_config={**stored, "dtype": "INT"})
    return (*_dynamic("EMBEDDING_LOOKUP", bits=8), matrices)


def _blockwise(size: int) -> Recipe:
    return Recipe(
        f"dynamic_int4_block{size}",
        f"as dynamic_int4, with a scale for every {size} weights of a row",
        settings=_dynamic("FULLY_CONNECTED", "EMBEDDING_LOOKUP", bits=4, granularity=f"BLOCKWISE_{size}"),
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("none", "float32 weights and activations, as converted", is_lossy=False),
        Recipe(
            "float16",
            "float16 weights, float32 activations",
            settings=_casting("FULLY_CONNECTED", "EMBEDDING_LOOKUP"),
        ),
        Recipe(
            "dynamic_int8",
            "int8 weights, int8 matmuls on activations quantized at run time",
            settings=_dynamic(ALL_OPERATIONS, bits=8),
        ),
        Recipe(
            "weight_only_int8",
            "int8 weights, dequantized to float32 before each matmul",
            settings=_weight_only(ALL_OPERATIONS, 8),
        ),
        Recipe(
            "dynamic_int4",
            "int4 weights, int8 activations quantized at run time",
            settings=_dynamic(ALL_OPERATIONS, bits=4),
        ),
        Recipe(
            "weight_only_int4",
            "int4 weights, dequantized to float32 before each matmul",
            settings=_weight_only(ALL_OPERATIONS, 4),
        ),
        *(_blockwise(size) for size in (32, 64, 128)),
        Recipe(
            "mixed_int4",
            "int4 weights of linear layers, int8 embeddings, int8 activations quantized at run time",
            settings=_dynamic("FULLY_CONNECTED", bits=4) + _dynamic("EMBEDDING_LOOKUP", bits=8),
        ),
        Recipe(
            "static_int8",
            "int8 weights, matmuls on int8 activations whose ranges calibration fixed",
            settings=_static(8),
        ),
        Recipe(
            "static_int16",
            "int8 weights, matmuls on int16 activations whose ranges calibration fixed",
            settings=_static(16),
        ),
    )
}


def parse_own_recipe(name: str, document: Any) -> Settings:
    """Check a user's own recipe, as ai-edge-quantizer has it in JSON, and return its canonical form.

    Raises `RecipeInvalid` for a name that is none or is taken and for settings that the quantizer does not take.
    """
    if not OWN_NAME.fullmatch(name) or name in RECIPES:
        raise RecipeInvalid(
            f"{name[:60]!r} cannot name an own recipe: take small letters, digits and _, at most 40, a letter first, "
            "and none of the names that `edgekiln recipes` lists.",
            recipe=name[:60],
        )
    # Whoever only lists names need not wait for pydantic.
    from service.recipe_schema import parse_settings

    return parse_settings(name, document)


def find_recipe(name: str, own_recipes: Mapping[str, Sequence[Mapping[str, Any]]] | None = None) -> Recipe:
    """Return a recipe by its canonical name, or one of the request's own; else raise `UnknownName`.

    `own_recipes` holds settings as `parse_own_recipe` returned them.
    """
    own = own_recipes or {}
    if name in own:
        return Recipe(name, "an own recipe", settings=tuple(own[name]))
    return RECIPES[require_known("recipe", name, [*RECIPES, *own])]


def is_own_name(name: str) -> bool:
    """Return whether a name can only be that of an own recipe."""
    return name not in RECIPES and OWN_NAME.fullmatch(name) is not None


def needs_calibration(name: str, own_recipes: Mapping[str, Sequence[Mapping[str, Any]]] | None = None) -> bool:
    """Return whether a recipe's quantization runs the float graph on calibration text first."""
    return find_recipe(name, own_recipes).needs_calibration


def require_runnable(recipe: Recipe, engines: Iterable[str], formats: Iterable[str]) -> None:
    """Refuse a recipe that an engine or a format cannot run; raises `RecipeUnfit` with the reason and what to ask."""
    static = {str(entry["operation"]) for entry in recipe.settings if recipe_settings.has_static_activations(entry)}
    for obstacle in OBSTACLES:
        hit = sorted(static & obstacle.static_operations)
        unable = [name for name in engines if name in obstacle.engines]
        unfit = [name for name in formats if name in obstacle.formats]
        if hit and unable and unfit:
            raise RecipeUnfit(
                f"The recipe {recipe.name!r} cannot run as {', '.join(unfit)} from the engine {' or '.join(unable)}: "
                f"its static setting of {', '.join(hit)} fails, because {obstacle.reason}. Ask for {obstacle.instead}.",
                recipe=recipe.name,
                engines=unable,
                formats=unfit,
                operations=hit,
            )


def require_divisible(recipe: Recipe, row_lengths: Mapping[str, int]) -> None:
    """Refuse blocks that do not divide the rows of a checkpoint's matrices; raises `RecipeUnfit`.

    `row_lengths` maps what a matrix is called to its number of inputs.
    """
    for size in recipe.block_sizes:
        for matrix, length in row_lengths.items():
            if length % size:
                able = [
                    each.name
                    for each in RECIPES.values()
                    if each.block_sizes and all(n % each.block_sizes[0] == 0 for n in row_lengths.values())
                ]
                raise RecipeUnfit(
                    f"The recipe {recipe.name!r} cuts rows into blocks of {size}, and those of {matrix} have {length} "
                    f"values. Ask for {' or '.join([*able, 'mixed_int4', 'dynamic_int4'])}.",
                    recipe=recipe.name,
                    block_size=size,
                    matrix=matrix,
                    row_length=length,
                )


def describe_recipes() -> list[dict[str, Any]]:
    """Return all canonical recipes as the REST API and `edgekiln recipes --json` state them."""
    return [
        {
            "name": recipe.name,
            "description": recipe.description,
            "is_lossy": recipe.is_lossy,
            "needs_calibration": recipe.needs_calibration,
            "block_sizes": recipe.block_sizes,
            "constraint": recipe.constraint,
            "engines": list(ENGINES),
            "formats": list(FORMATS),
            "settings": [dict(entry) for entry in recipe.settings],
        }
        for recipe in RECIPES.values()
    ]


def require_known(kind: str, name: str, known: Iterable[str]) -> str:
    """Return `name` if it is one of `known`; else raise `UnknownName` that offers the nearest one."""
    names = list(known)
    if name in names:
        return name
    nearest = difflib.get_close_matches(name.lower().replace("-", "_"), names, n=1, cutoff=0.4)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise UnknownName(
        f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.",
        kind=kind,
        name=name,
        nearest=nearest[0] if nearest else None,
        known=names,
    )
