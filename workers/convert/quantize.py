"""The step `quantize`: one recipe applied to the float model; also runs by hand.

Owns what each recipe name means to ai-edge-quantizer. Writes `model.tflite`; knows no bundle and no tokenizer.
Called by `workers.sandbox` and `python -m workers.convert.quantize`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ai_edge_quantizer import qtyping, quantizer, recipe, recipe_manager
from ai_edge_quantizer.algorithm_manager import AlgorithmName

from service.errors import QuantizationFailed
from service.recipes import RECIPES, require_known
from workers.steps import Progress, run_by_hand

MODEL_FILE = "model.tflite"

ToolRecipe = list[dict[str, Any]]

#: Operations whose weights ai-edge-quantizer 0.10.0 casts to float16.
_FLOAT16_OPERATIONS = (
    qtyping.TFLOperationName.FULLY_CONNECTED,
    qtyping.TFLOperationName.EMBEDDING_LOOKUP,
)


def _build_float16() -> ToolRecipe:
    """Weights of matrix products and embeddings as float16, widened to float32 before use."""
    manager = recipe_manager.RecipeManager()
    for operation in _FLOAT16_OPERATIONS:
        manager.add_quantization_config(
            regex=".*",
            operation_name=operation,
            op_config=qtyping.OpQuantizationConfig(
                weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
                compute_precision=qtyping.ComputePrecision.FLOAT,
                explicit_dequantize=True,
            ),
            algorithm_key=AlgorithmName.FLOAT_CASTING,
        )
    return list(manager.get_quantization_recipe())


#: What each recipe asks of the tool; `none` asks nothing.
TOOL_RECIPES: dict[str, Callable[[], ToolRecipe] | None] = {
    "none": None,
    "float16": _build_float16,
    "dynamic_int8": recipe.dynamic_wi8_afp32,
    "weight_only_int8": recipe.weight_only_wi8_afp32,
    "dynamic_int4": recipe.dynamic_wi4_afp32,
    "weight_only_int4": recipe.weight_only_wi4_afp32,
}


def run(params: Mapping[str, Any], inputs: Mapping[str, Path], output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Write the float model of `inputs["convert"]` under `params["recipe"]`; see `workers.steps`.

    The recipe `none` yields the same bytes. Raises `UnknownName` for another recipe and `QuantizationFailed`
    when the tool refuses the model or leaves it as it was.
    """
    name = require_known("recipe", params["recipe"], RECIPES)
    source = inputs["convert"] / MODEL_FILE
    target = output_dir / MODEL_FILE
    build = TOOL_RECIPES[name]
    progress(f"Quantizing with {name}", 0.0)
    if build is None:
        _reuse_bytes(source, target)
    else:
        _quantize(source, target, name, build())
    progress("Quantized", 1.0)
    size, float_size = target.stat().st_size, source.stat().st_size
    return {"recipe": name, "size_bytes": size, "float_size_bytes": float_size}


def _reuse_bytes(source: Path, target: Path) -> None:
    """Give `target` the bytes of `source`, without a copy where the file system allows it."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without hard links.
        shutil.copyfile(source, target)


def _quantize(source: Path, target: Path, name: str, tool_recipe: ToolRecipe) -> None:
    try:
        # The tool reports on standard output, which belongs to the figures.
        with contextlib.redirect_stdout(sys.stderr):
            result = quantizer.Quantizer(str(source), tool_recipe).quantize()
    except Exception as error:
        # The tool has no exceptions of its own; all of them mean that this model was not quantized.
        raise QuantizationFailed(
            f"The quantizer refused the model with the recipe {name!r}: {error}", recipe=name
        ) from error
    content = result.quantized_model
    if content is None:
        raise QuantizationFailed(f"The quantizer returned no model for the recipe {name!r}.", recipe=name)
    with target.open("wb") as stream:
        stream.write(content)
    if target.stat().st_size >= source.stat().st_size:
        raise QuantizationFailed(
            f"The recipe {name!r} made the model no smaller ({target.stat().st_size} bytes); it holds no weights that "
            "this recipe covers.",
            recipe=name,
        )


if __name__ == "__main__":
    raise SystemExit(run_by_hand(run, "Quantize a float model with one recipe."))
