"""What may be asked for: engines, recipes, formats and their names. Pure; no I/O, no third-party import.

Called by `service.api`, `service.cli`, `service.ledger.plan` and, for the quantizer's own settings, by
`workers.convert.quantize`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from service.errors import UnknownName


@dataclass(frozen=True)
class Recipe:
    """How weights and activations are stored and computed."""

    #: Canonical name; wire format.
    name: str
    #: One line for `--help`.
    description: str
    #: Whether weights lose precision; decides which default gates apply.
    is_lossy: bool


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("none", "float32 weights and activations, as converted", is_lossy=False),
        Recipe("float16", "float16 weights, float32 activations", is_lossy=True),
        Recipe("dynamic_int8", "int8 weights, int8 matmuls on activations quantized at run time", True),
        Recipe("weight_only_int8", "int8 weights, dequantized to float32 before each matmul", True),
        Recipe("dynamic_int4", "int4 weights, int8 activations quantized at run time", True),
        Recipe("weight_only_int4", "int4 weights, dequantized to float32 before each matmul", True),
    )
}

#: Artifact kinds and their file suffixes.
FORMATS: tuple[str, ...] = ("tflite", "task", "litertlm")

#: Engines a job may name; `auto` is resolved by the `plan` step.
ENGINES: tuple[str, ...] = ("auto", "reauthored", "traced")

#: Where a benchmark may run.
DEVICES: tuple[str, ...] = ("host",)


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
