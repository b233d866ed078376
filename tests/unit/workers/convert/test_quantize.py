"""What a recipe leaves in a graph, what is said of it, and what is refused; models are quantized in `tests/convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from service.errors import QuantizationFailed, UnknownName
from service.recipes import parse_own_recipe
from tests.graphs import write_linear_graph
from workers.convert import quantize

ROWS = 64


def ignore(_message: str, _fraction: float | None = None) -> None:
    """Take progress and say nothing."""


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "convert"
    folder.mkdir()
    random = np.random.default_rng(7)
    weights = {name: random.standard_normal((ROWS, ROWS), dtype=np.float32) for name in ("first", "second")}
    write_linear_graph(folder / "model.tflite", weights)
    return {"convert": folder}


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def products(*counts: tuple[str, int], computed: str = "float32") -> list[dict[str, Any]]:
    """Return what the figures say of matrix products, by the type of their weights."""
    return [
        {"operation": "FULLY_CONNECTED", "weights": stored, "input": computed, "count": count}
        for stored, count in counts
    ]


def own(regex: str, **settings: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "granularity": "CHANNELWISE"}
    config = {"weight_tensor_config": weights, "compute_precision": "INTEGER", **settings}
    return {"regex": regex, "operation": "FULLY_CONNECTED", "op_config": config}


def test_the_recipe_none_yields_the_same_bytes(inputs: dict[str, Path], output_dir: Path) -> None:
    figures = quantize.run({"recipe": "none"}, inputs, output_dir, ignore)
    source, target = inputs["convert"] / "model.tflite", output_dir / "model.tflite"
    assert target.read_bytes() == source.read_bytes()
    assert target.samefile(source)
    assert figures["size_bytes"] == figures["float_size_bytes"] == source.stat().st_size
    assert figures["weights"] == {"float32": {"tensors": 2, "bytes": 2 * ROWS * ROWS * 4}}
    assert figures["operations"] == products(("float32", 2))


def test_the_recipe_none_copies_across_file_systems(
    inputs: dict[str, Path], output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_source: Path, _target: Path) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    quantize.run({"recipe": "none"}, inputs, output_dir, ignore)
    source, target = inputs["convert"] / "model.tflite", output_dir / "model.tflite"
    assert target.read_bytes() == source.read_bytes()
    assert not target.samefile(source)


@pytest.mark.parametrize(
    ("recipe", "stored", "size_bytes"),
    [
        ("float16", "float16", ROWS * ROWS * 2),
        ("dynamic_int8", "int8", ROWS * ROWS),
        ("weight_only_int8", "int8", ROWS * ROWS),
        ("dynamic_int4", "int4", ROWS * ROWS // 2),
        ("weight_only_int4", "int4", ROWS * ROWS // 2),
        ("dynamic_int4_block32", "int4", ROWS * ROWS // 2),
        ("dynamic_int4_block64", "int4", ROWS * ROWS // 2),
        ("mixed_int4", "int4", ROWS * ROWS // 2),
    ],
)
def test_figures_say_how_weights_are_stored(
    inputs: dict[str, Path], output_dir: Path, recipe: str, stored: str, size_bytes: int
) -> None:
    figures = quantize.run({"recipe": recipe}, inputs, output_dir, ignore)
    assert figures["weights"][stored] == {"tensors": 2, "bytes": 2 * size_bytes}
    assert figures["operations"] == products((stored, 2))


def test_what_an_own_recipe_leaves_out_is_seen(inputs: dict[str, Path], output_dir: Path) -> None:
    settings = parse_own_recipe("mine", [own("second")])
    figures = quantize.run({"recipe": "mine", "settings": settings}, inputs, output_dir, ignore)
    assert figures["recipe"] == "mine"
    assert set(figures["weights"]) == {"float32", "int4"}
    assert figures["operations"] == products(("float32", 1), ("int4", 1))


def test_a_recipe_that_changes_nothing_is_refused(inputs: dict[str, Path], output_dir: Path) -> None:
    settings = parse_own_recipe("mine", [own("nowhere")])
    with pytest.raises(QuantizationFailed, match="'mine' changed nothing"):
        quantize.run({"recipe": "mine", "settings": settings}, inputs, output_dir, ignore)


def test_blocks_that_do_not_divide_rows_are_refused_by_the_tool(inputs: dict[str, Path], output_dir: Path) -> None:
    with pytest.raises(QuantizationFailed, match="not divisible by block size 128"):
        quantize.run({"recipe": "dynamic_int4_block128"}, inputs, output_dir, ignore)


@pytest.mark.parametrize("rows", [ROWS, 2048], ids=["inside the flatbuffer", "behind it"])
def test_blocks_of_zeros_run(tmp_path: Path, output_dir: Path, rows: int) -> None:
    weights = np.random.default_rng(7).standard_normal((rows, 256), dtype=np.float32)
    weights[3, :96] = 0.0
    inputs = {"convert": tmp_path / "zeros"}
    inputs["convert"].mkdir()
    write_linear_graph(inputs["convert"] / "model.tflite", {"only": weights})
    quantize.run({"recipe": "dynamic_int4_block32"}, inputs, output_dir, ignore)
    run = Interpreter(str(output_dir / "model.tflite")).get_signature_runner("serving_default")
    asked = np.linspace(-1, 1, 256, dtype=np.float32)[None]
    expected = asked @ weights.T
    # A weight is off by a seventh of the largest of its block at most; of all together little remains.
    assert np.abs(run(input=asked)["output"] - expected).max() < 0.2 * np.abs(expected).max()


def test_an_unknown_recipe_is_refused_with_the_nearest(inputs: dict[str, Path], output_dir: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'dynamic_int8'"):
        quantize.run({"recipe": "dynamic-int-8"}, inputs, output_dir, ignore)


def test_a_file_that_is_no_graph_is_refused(inputs: dict[str, Path], output_dir: Path) -> None:
    (inputs["convert"] / "model.tflite").write_bytes(b"not a graph" * 10)
    with pytest.raises(QuantizationFailed, match="'dynamic_int8'"):
        quantize.run({"recipe": "dynamic_int8"}, inputs, output_dir, ignore)
