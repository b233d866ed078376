"""The recipes' names, and what is refused; real models are quantized in `tests/convert`."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import QuantizationFailed, UnknownName
from service.recipes import RECIPES
from workers.convert import quantize


def ignore(_message: str, _fraction: float | None = None) -> None:
    """Take progress and say nothing."""


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "convert"
    folder.mkdir()
    (folder / "model.tflite").write_bytes(b"not a graph" * 10)
    return {"convert": folder}


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_every_recipe_that_may_be_asked_for_is_known_here() -> None:
    assert set(quantize.TOOL_RECIPES) == set(RECIPES)


def test_the_recipe_none_yields_the_same_bytes(inputs: dict[str, Path], output_dir: Path) -> None:
    figures = quantize.run({"recipe": "none"}, inputs, output_dir, ignore)
    source, target = inputs["convert"] / "model.tflite", output_dir / "model.tflite"
    assert target.read_bytes() == source.read_bytes()
    assert target.samefile(source)
    assert figures["size_bytes"] == figures["float_size_bytes"] == source.stat().st_size


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


def test_an_unknown_recipe_is_refused_with_the_nearest(inputs: dict[str, Path], output_dir: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'dynamic_int8'"):
        quantize.run({"recipe": "dynamic-int-8"}, inputs, output_dir, ignore)


def test_a_file_that_is_no_graph_is_refused(inputs: dict[str, Path], output_dir: Path) -> None:
    with pytest.raises(QuantizationFailed, match="'dynamic_int8'"):
        quantize.run({"recipe": "dynamic_int8"}, inputs, output_dir, ignore)
