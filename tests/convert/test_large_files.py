"""Graphs of more than 2 GiB in every step that reads one; sparse, so that they cost seconds and no disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.convert.conftest import CONTEXT_LENGTH, PREFILL_LENGTHS, Workshop, ignore
from tests.large_graph import WEIGHTS_BEGIN_BYTES, spread_graph
from workers.convert import bundle, convert, quantize
from workers.verify import reference, verify

LENGTHS: dict[str, Any] = {"context_length": CONTEXT_LENGTH, "prefill_lengths": list(PREFILL_LENGTHS)}


@pytest.fixture(scope="module")
def large(reauthored_workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the float graph, spread over 2 GiB."""
    folder = tmp_path_factory.mktemp("large")
    spread_graph(reauthored_workshop.convert / "model.tflite", folder / "model.tflite")
    assert (folder / "model.tflite").stat().st_size > WEIGHTS_BEGIN_BYTES
    return folder


@pytest.fixture(scope="module")
def answers(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    reference.run(LENGTHS, {"checkpoint": tiny_checkpoint}, folder, ignore)
    return folder


def run_quantize(recipe: str, source: Path, folder: Path) -> Path:
    folder.mkdir()
    quantize.run({"recipe": recipe}, {"convert": source}, folder, ignore)
    return folder


def test_its_signatures_are_read(large: Path) -> None:
    assert convert.read_signatures(large / "model.tflite") == ["decode", "prefill_16", "prefill_64"]


def test_it_is_quantized_as_a_small_one(reauthored_workshop: Workshop, large: Path, tmp_path: Path) -> None:
    quantized = run_quantize("dynamic_int8", large, tmp_path / "int8") / "model.tflite"
    small = reauthored_workshop.quantize("dynamic_int8") / "model.tflite"
    assert quantized.read_bytes() == small.read_bytes()


@pytest.mark.parametrize("kind", ["tflite", "litertlm", "task"])
def test_it_is_bundled_and_proven(
    reauthored_workshop: Workshop, large: Path, answers: Path, tmp_path: Path, kind: str
) -> None:
    inputs = {"reference": answers, "quantize": run_quantize("none", large, tmp_path / "none")}
    proof = tmp_path / "proof"
    proof.mkdir()
    figures = verify.run({"format": "tflite", "recipe": "none", **LENGTHS}, inputs, proof, ignore)
    if kind != "tflite":
        packed = tmp_path / "bundle"
        packed.mkdir()
        sources = {"checkpoint": reauthored_workshop.checkpoint, "quantize": inputs["quantize"]}
        bundle.run({"format": kind, "context_length": CONTEXT_LENGTH}, sources, packed, ignore)
        assert (packed / f"model.{kind}").stat().st_size > WEIGHTS_BEGIN_BYTES
        inputs = {"reference": answers, "bundle": packed, "verify_tflite": proof}
        figures = verify.run({"format": kind, "recipe": "none", **LENGTHS}, inputs, tmp_path, ignore)
    assert figures["size_bytes"] > WEIGHTS_BEGIN_BYTES
    assert figures["generation"]["match_ratio"] == 1.0
    assert figures["context"]["unusable_tokens"] == 0
