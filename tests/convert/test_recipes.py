"""Recipes on real graphs of both engines: what static graphs keep, what calibration shows them, what own recipes do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from service.recipes import parse_own_recipe
from tests.convert.conftest import Workshop
from workers.verify.graph import Graph

INT4 = {"weight_tensor_config": {"num_bits": 4, "granularity": "CHANNELWISE"}, "compute_precision": "INTEGER"}


def list_inputs(path: Path) -> dict[str, dict[str, Any]]:
    """Return shape and type of every signature's inputs."""
    interpreter = Interpreter(str(path))
    runners = {name: interpreter.get_signature_runner(name) for name in interpreter.get_signature_list()}
    return {
        signature: {name: (each["shape"].tolist(), each["dtype"]) for name, each in runner.get_input_details().items()}
        for signature, runner in runners.items()
    }


@pytest.mark.parametrize(("recipe", "computed"), [("static_int8", "int8"), ("static_int16", "int16")])
def test_static_graphs_compute_with_integers_between_float_borders(
    workshop: Workshop, recipe: str, computed: str, tmp_path: Path
) -> None:
    figures = workshop.quantize_anew(recipe, tmp_path)
    products = [each for each in figures["operations"] if each["operation"] == "FULLY_CONNECTED"]
    assert [(each["weights"], each["input"]) for each in products] == [("int8", computed)]
    assert list_inputs(tmp_path / "model.tflite") == list_inputs(workshop.convert / "model.tflite")
    shown = figures["calibration"]["tokens_by_signature"]
    assert set(shown) == set(workshop.figures["signatures"])
    assert all(shown.values())
    assert np.isfinite(Graph(tmp_path / "model.tflite").decode(5, 0)).all()


def test_uploaded_prompts_are_what_ranges_are_measured_on(reauthored_workshop: Workshop, tmp_path: Path) -> None:
    upload = tmp_path / "calibration" / "upload"
    upload.parent.mkdir()
    lines = [json.dumps({"prompt": prompt}) for prompt in ("The kiln is hot", "12+7=", "word " * 400)]
    upload.write_text("\n".join(lines), encoding="utf-8")
    figures = reauthored_workshop.quantize_anew("static_int8", tmp_path, upload=upload, calibration={"kind": "prompts"})
    assert figures["calibration"]["kind"] == "prompts"
    assert (figures["calibration"]["prompts"], figures["calibration"]["prompts_truncated"]) == (3, 1)
    other = reauthored_workshop.quantize("static_int8") / "model.tflite"
    assert (tmp_path / "model.tflite").read_bytes() != other.read_bytes()


@pytest.mark.parametrize("algorithm", ["OCTAV", "DECOMPOSED_HADAMARD_ROTATION", "OSCAR"])
def test_own_recipes_run(reauthored_workshop: Workshop, algorithm: str, tmp_path: Path) -> None:
    entry = {"regex": ".*", "operation": "FULLY_CONNECTED", "algorithm_key": algorithm, "op_config": INT4}
    settings = parse_own_recipe("mine", [entry])
    figures = reauthored_workshop.quantize_anew("mine", tmp_path, settings=settings)
    assert ("calibration" in figures) == (algorithm == "OSCAR")
    assert figures["weights"]["int4"]["tensors"] > 0
    assert np.isfinite(Graph(tmp_path / "model.tflite").decode(5, 0)).all()
