"""The step `quantize`: one recipe applied to the float model; also runs by hand.

Owns the call of ai-edge-quantizer; what a recipe means to it are the recipe's settings (`service.recipes`). Writes
`model.tflite`; knows no bundle. Called by `workers.sandbox` and `python -m workers.convert.quantize`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_quantizer import quantizer

from service.errors import QuantizationFailed
from service.recipes import Recipe, find_recipe
from service.user_files import UPLOAD_FILE
from workers.convert.block_scales import fill_empty_scales
from workers.convert.calibration import Statistics, calibrate
from workers.convert.calibration_text import read_calibration_text
from workers.convert.storage import describe_storage
from workers.steps import Progress, run_by_hand

MODEL_FILE = "model.tflite"


def run(params: Mapping[str, Any], inputs: Mapping[str, Path], output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Write the float model of `inputs["convert"]` under `params["recipe"]`; see `workers.steps`.

    `params["settings"]` hold what an own recipe asks of the tool, in canonical form. A recipe that needs calibration
    reads `inputs["checkpoint"]`, `params["context_length"]` and, for uploaded data, `params["calibration"]` (`kind`:
    `text` or `prompts`) and `inputs["calibration"]`. The recipe `none` yields the same bytes. The figures say how many
    bytes and operations the graph holds by the type they are stored in. Raises `UnknownName` for another recipe,
    `CalibrationInvalid`, and `QuantizationFailed` when the tool refuses the model or leaves it as it was.
    """
    settings = params.get("settings")
    recipe = find_recipe(params["recipe"], {params["recipe"]: settings} if settings else None)
    source = inputs["convert"] / MODEL_FILE
    target = output_dir / MODEL_FILE
    progress(f"Quantizing with {recipe.name}", 0.0)
    statistics: Statistics | None = None
    calibrated: dict[str, Any] = {}
    if recipe.needs_calibration:
        statistics, calibrated["calibration"] = _calibrate(params, inputs, recipe, progress)
    if recipe.settings:
        _quantize(source, target, recipe, statistics)
    else:
        _reuse_bytes(source, target)
    stored = describe_storage(target)
    if recipe.settings and stored == describe_storage(source):
        raise QuantizationFailed(
            f"The recipe {recipe.name!r} changed nothing: the graph holds no weights that it covers.",
            recipe=recipe.name,
        )
    progress("Quantized", 1.0)
    sizes = {"size_bytes": target.stat().st_size, "float_size_bytes": source.stat().st_size}
    return {"recipe": recipe.name, **sizes, **stored, **calibrated}


def _reuse_bytes(source: Path, target: Path) -> None:
    """Give `target` the bytes of `source`, without a copy where the file system allows it."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without hard links.
        shutil.copyfile(source, target)


def _calibrate(
    params: Mapping[str, Any], inputs: Mapping[str, Path], recipe: Recipe, progress: Progress
) -> tuple[Statistics, dict[str, Any]]:
    asked = params.get("calibration") or {}
    upload = inputs["calibration"] / UPLOAD_FILE if "calibration" in inputs else None
    text = read_calibration_text(asked.get("kind"), upload, inputs["checkpoint"], int(params["context_length"]))
    with contextlib.redirect_stdout(sys.stderr):
        return calibrate(inputs["convert"] / MODEL_FILE, recipe.settings, text, progress)


def _quantize(source: Path, target: Path, recipe: Recipe, statistics: Statistics | None) -> None:
    try:
        # The tool reports on standard output, which belongs to the figures, and divides blocks of zeros by their range.
        with contextlib.redirect_stdout(sys.stderr), np.errstate(divide="ignore", invalid="ignore"):
            tool = quantizer.Quantizer(str(source), [dict(entry) for entry in recipe.settings])
            # Both files are mapped: neither is held in memory, whatever its size.
            tool.quantize(
                statistics, serialize_to_path=str(target), enable_progress_bar=False, enable_progress_report=False
            )
    except Exception as error:
        # The tool has no exceptions of its own; all of them mean that this model was not quantized.
        raise QuantizationFailed(
            f"The quantizer refused the model with the recipe {recipe.name!r}: {error}", recipe=recipe.name
        ) from error
    if recipe.has_blocks:
        fill_empty_scales(target)


if __name__ == "__main__":
    raise SystemExit(run_by_hand(run, "Quantize a float model with one recipe."))
