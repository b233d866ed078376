"""The memory model against measurements, and what it must depend on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from workers.convert.architectures import DecoderShape, find_family
from workers.fetch.memory import predict_peaks

_MIB = 1 << 20
#: Aim of the prediction.
TOLERANCE = 0.25


def llama(vocabulary: int, hidden: int, feed_forward: int, layers: int, heads: int, groups: int, **more: Any) -> Any:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        **more,
    }
    return find_family(config).read_shape(config)


#: Name -> shape and parameters.
SHAPES: dict[str, tuple[DecoderShape, int]] = {
    "smollm135m": (llama(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True), 134_515_008),
    "wide": (llama(32000, 2048, 5632, 2, 32, 4, tie_word_embeddings=False), 219_164_672),
    "tinyllama1b": (llama(32000, 2048, 5632, 22, 32, 4, tie_word_embeddings=False), 1_100_048_384),
}
EVERYTHING: dict[str, Any] = {
    "engines": ("reauthored", "traced"),
    "recipes": ("none", "float16", "dynamic_int8", "weight_only_int8", "dynamic_int4"),
    "formats": ("tflite", "task", "litertlm"),
    "prefill_lengths": [128],
    "context_length": 1280,
}
#: MiB, as measured with `benchmarks/step_memory.py`; see docs/memory.md.
MEASURED: list[tuple[str, str, int]] = [
    ("smollm135m", "reference", 1016),
    ("smollm135m", "convert:traced", 3114),
    ("smollm135m", "bundle", 114),
    ("smollm135m", "verify:none:tflite", 1501),
    ("smollm135m", "verify:dynamic_int8:tflite", 816),
    ("wide", "reference", 1417),
    ("wide", "bundle", 94),
    ("wide", "verify:none:tflite", 1027),
    ("wide", "verify:float16:tflite", 1540),
    ("wide", "verify:dynamic_int8:tflite", 431),
    ("wide", "verify:weight_only_int8:tflite", 2306),
    ("wide", "verify:dynamic_int4:tflite", 351),
    ("tinyllama1b", "reference", 4926),
    ("tinyllama1b", "convert:reauthored", 1022),
    ("tinyllama1b", "quantize:dynamic_int8", 1236),
    ("tinyllama1b", "bundle", 92),
    ("tinyllama1b", "verify:dynamic_int8:tflite", 2445),
    ("tinyllama1b", "verify:dynamic_int8:litertlm", 2449),
    ("tinyllama1b", "verify:dynamic_int8:task", 2062),
]


@pytest.mark.parametrize(("name", "step", "measured_mib"), MEASURED)
def test_the_prediction_is_within_a_quarter_of_what_was_measured(name: str, step: str, measured_mib: int) -> None:
    shape, parameters = SHAPES[name]
    predicted = predict_peaks(shape, parameters, **EVERYTHING)[step]
    assert predicted / _MIB == pytest.approx(measured_mib, rel=TOLERANCE)


def test_every_step_that_holds_weights_is_predicted() -> None:
    shape, parameters = SHAPES["wide"]
    names = set(predict_peaks(shape, parameters, **EVERYTHING))
    assert {name.split(":")[0] for name in names} == {"reference", "convert", "quantize", "bundle", "verify"}
    assert {"convert:reauthored", "convert:traced", "quantize:dynamic_int4", "verify:none:task"} <= names


def test_what_is_not_asked_for_is_not_predicted() -> None:
    shape, parameters = SHAPES["wide"]
    asked = {**EVERYTHING, "engines": ["traced"], "recipes": ["none"], "formats": ["task"]}
    names = {"reference", "bundle", "convert:traced", "quantize:none", "verify:none:tflite", "verify:none:task"}
    assert set(predict_peaks(shape, parameters, **asked)) == names


@pytest.mark.parametrize("step", ["reference", "convert:reauthored", "quantize:dynamic_int8", "verify:none:tflite"])
def test_more_of_anything_needs_no_less(step: str) -> None:
    shape, parameters = SHAPES["wide"]
    before = predict_peaks(shape, parameters, **EVERYTHING)[step]
    larger: list[tuple[DecoderShape, int, dict[str, Any]]] = [
        (shape, 2 * parameters, {}),
        (replace(shape, layers=2 * shape.layers), parameters, {}),
        (shape, parameters, {"context_length": 2048}),
        (shape, parameters, {"prefill_lengths": [64, 128]}),
    ]
    after = [predict_peaks(changed, count, **{**EVERYTHING, **more})[step] for changed, count, more in larger]
    assert min(after) >= before
    assert max(after) > before


def test_an_own_recipe_counts_as_float32() -> None:
    shape, parameters = SHAPES["wide"]
    asked = {**EVERYTHING, "recipes": ["mine", "none", "dynamic_int8"]}
    peaks = predict_peaks(shape, parameters, **asked)
    assert peaks["verify:mine:tflite"] == peaks["verify:none:tflite"] > peaks["verify:dynamic_int8:tflite"]
