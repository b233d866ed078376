"""Damaged models that the default gates must reject, beside the sound one that they must let pass.

Weights are damaged inside the finished float graph, the rope on the source's side, stop tokens in the bundle's
metadata: one conversion serves all. Every control is also run undamaged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from litert_lm_builder.runtime.proto import llm_metadata_pb2
from safetensors.torch import load_file

from service import gates
from service.recipes import RECIPES
from tests.convert.conftest import CONTEXT_LENGTH, PREFILL_LENGTHS, Workshop, ignore, run_engine
from workers.convert import bundle, bundle_reader
from workers.convert.tokenizer import carry_as_is
from workers.verify import reference, verify

Weights = dict[str, npt.NDArray[np.float32]]

EXAMPLE = Path(__file__).parents[2] / "examples" / "addition"
LAYERS = 3
#: One recipe of every set of default limits and way to compute; float16 has stricter limits than these lossy ones.
REPRESENTATIVES = ("none", "dynamic_int8", "dynamic_int4", "dynamic_int4_block32", "mixed_int4", "static_int8")
#: Its rows of 192 are no multiples of 128.
FITTING = [name for name in RECIPES if name != "dynamic_int4_block128"]
LENGTHS: dict[str, Any] = {"context_length": CONTEXT_LENGTH, "prefill_lengths": list(PREFILL_LENGTHS)}


@dataclass(frozen=True)
class Example:
    """The trained example, its float graph and what the source answers."""

    workshop: Workshop
    reference: Path
    weights: Weights
    config: dict[str, Any]

    def measure(self, graph_dir: Path, recipe: str, reference_dir: Path | None = None) -> dict[str, Any]:
        """Verify a bare graph; returns merged figures."""
        inputs = {"reference": reference_dir or self.reference, "quantize": graph_dir}
        output_dir = self.workshop.folder / "proof"
        output_dir.mkdir(exist_ok=True)
        figures = verify.run({"format": "tflite", "recipe": recipe, **LENGTHS}, inputs, output_dir, ignore)
        return gates.merge_figures([figures])

    def measure_bundle(self, bundle_dir: Path, bundle_format: str) -> dict[str, Any]:
        """Verify the float graph and a bundle of it; returns merged figures."""
        inputs = {
            "reference": self.reference,
            "quantize": self.workshop.quantize("none"),
            "bundle": bundle_dir,
            "verify_tflite": bundle_dir,
        }
        figures = [
            verify.run({"format": kind, "recipe": "none", **LENGTHS}, inputs, bundle_dir, ignore)
            for kind in ("tflite", bundle_format)
        ]
        return gates.merge_figures(figures)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    folder = tmp_path_factory.mktemp("example")
    workshop = run_engine("reauthored", EXAMPLE, folder)
    answers = answer_source(EXAMPLE, folder / "reference")
    weights = {name: tensor.float().numpy() for name, tensor in load_file(EXAMPLE / "model.safetensors").items()}
    return Example(workshop, answers, weights, json.loads((EXAMPLE / "config.json").read_text(encoding="utf-8")))


def answer_source(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir()
    reference.run(LENGTHS, {"checkpoint": checkpoint}, folder, ignore)
    return folder


def refused(recipe: str, figures: dict[str, Any]) -> set[str]:
    return {verdict.gate for verdict in gates.judge(recipe, figures) if not verdict.passed}


def replace_once(content: bytes, old: npt.NDArray[np.float32], new: npt.NDArray[np.float32]) -> bytes:
    """Put other weights in the place of some; they must stand in the graph exactly once."""
    assert content.count(old.tobytes()) == 1
    return content.replace(old.tobytes(), new.tobytes())


def swap_query_and_key(content: bytes, example: Example, layer: int) -> bytes:
    """Exchange each key head with the first query head of its group."""
    size, groups = example.config["head_dim"], example.config["num_key_value_heads"]
    per_group = example.config["num_attention_heads"] // groups
    queries = example.weights[f"model.layers.{layer}.self_attn.q_proj.weight"]
    keys = example.weights[f"model.layers.{layer}.self_attn.k_proj.weight"]
    for group in range(groups):
        query = queries[group * per_group * size :][:size]
        key = keys[group * size :][:size]
        placeholder = np.full_like(query, 12345.0)
        content = replace_once(content, query, placeholder)
        content = replace_once(content, key, query)
        content = replace_once(content, placeholder, key)
    return content


def zero_layer(content: bytes, example: Example, layer: int) -> bytes:
    """Zero both outputs of a layer, so that it adds nothing."""
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weight = example.weights[f"model.layers.{layer}.{name}.weight"]
        content = replace_once(content, weight, np.zeros_like(weight))
    return content


@pytest.mark.parametrize("recipe", FITTING)
def test_sound_example_passes_under_every_recipe(example: Example, recipe: str) -> None:
    figures = example.measure(example.workshop.quantize(recipe), recipe)
    assert refused(recipe, figures) == set()
    assert figures["quality"]["exact_match_count"] == 250


@pytest.mark.parametrize("recipe", ["none", "dynamic_int8"])
def test_accuracy_stays_within_two_points_of_the_source(example: Example, recipe: str) -> None:
    quality = example.measure(example.workshop.quantize(recipe), recipe)["quality"]
    assert quality["source_exact_match"] > 0.95
    assert abs(quality["source_exact_match"] - quality["exact_match"]) <= 0.02


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("damage", [swap_query_and_key, zero_layer])
def test_damaged_layer_is_rejected_under_every_kind_of_limits(
    example: Example, tmp_path: Path, damage: Callable[[bytes, Example, int], bytes], layer: int
) -> None:
    sound = (example.workshop.convert / "model.tflite").read_bytes()
    (tmp_path / "model.tflite").write_bytes(damage(sound, example, layer))
    for recipe in REPRESENTATIVES:
        graph_dir = tmp_path / recipe
        graph_dir.mkdir()
        example.workshop.quantize_anew(recipe, graph_dir, tmp_path)
        assert refused(recipe, example.measure(graph_dir, recipe)), recipe


def test_wrong_rope_theta_is_rejected_under_every_kind_of_limits(example: Example, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(EXAMPLE, checkpoint)
    other = {**example.config, "rope_theta": example.config["rope_theta"] * 10}
    (checkpoint / "config.json").write_text(json.dumps(other), encoding="utf-8")
    answers = answer_source(checkpoint, tmp_path / "reference")
    for recipe in REPRESENTATIVES:
        assert refused(recipe, example.measure(example.workshop.quantize(recipe), recipe, answers)), recipe


def test_ranges_of_another_text_are_rejected(example: Example, tmp_path: Path) -> None:
    upload = tmp_path / "calibration" / "upload"
    upload.parent.mkdir()
    upload.write_text("What is the harbour like at noon? " * 20, encoding="utf-8")
    example.workshop.quantize_anew("static_int8", tmp_path, upload=upload, calibration={"kind": "text"})
    assert refused("static_int8", example.measure(tmp_path, "static_int8"))


@pytest.mark.parametrize("bundle_format", ["litertlm", "task"])
def test_sound_bundle_passes_and_stops_where_the_source_stops(example: Example, bundle_format: str) -> None:
    figures = example.measure_bundle(example.workshop.bundle("none", bundle_format).parent, bundle_format)
    document = json.loads((example.reference / "reference.json").read_text(encoding="utf-8"))
    (long,) = (prompt for prompt in document["prompts"] if prompt.get("fills_context"))
    assert long["stopped"], "the context must be shown to be usable although the answer to the long prompt is short"
    assert refused("none", figures) == set()
    assert figures["generation"]["stops_expected"] >= 200
    assert figures["generation"]["stops_missed"] == 0
    assert figures["context"]["usable_tokens"] == CONTEXT_LENGTH
    assert figures["quality"]["exact_match"] == figures["quality"]["source_exact_match"]


def test_removed_stop_token_is_rejected(example: Example, tmp_path: Path) -> None:
    sound = example.workshop.bundle("none", "litertlm")
    metadata = llm_metadata_pb2.LlmMetadata.FromString(bundle_reader.extract_metadata(sound, "litertlm"))
    (stop,) = (sequence.token_ids.ids for sequence in metadata.stop_tokens)
    # The runtime refuses a bundle without any stop token, so another stands in its place.
    stop[0] = example.config["vocab_size"] - 1
    graph = example.workshop.quantize("none") / "model.tflite"
    bundle.write_litertlm(tmp_path / "model.litertlm", graph, carry_as_is(EXAMPLE), metadata.SerializeToString())
    figures = example.measure_bundle(tmp_path, "litertlm")
    assert {"stop_missed", "stop_declared", "runtime_stops"} <= refused("none", figures)
    assert figures["generation"]["stops_missed"] == figures["generation"]["stops_expected"] >= 200
