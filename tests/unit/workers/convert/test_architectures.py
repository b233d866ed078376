"""What each family reads from a config.json, and what it refuses by name."""

from __future__ import annotations

from typing import Any

import pytest

from service.errors import ArchitectureUnsupported, CheckpointInvalid, EdgeKilnError
from workers.convert import architectures
from workers.convert.architectures import Rope

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 20000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_every_size_comes_from_the_config() -> None:
    shape = architectures.read_shape(LLAMA)
    assert (shape.vocabulary_size, shape.hidden_size, shape.intermediate_size, shape.layers) == (512, 64, 128, 2)
    assert (shape.heads, shape.key_value_heads, shape.head_size) == (4, 2, 16)
    assert (shape.context_length, shape.norm_epsilon, shape.tied_embeddings) == (256, 1e-5, True)
    assert shape.family == "llama"
    assert shape.attention_window is None


def test_head_size_may_differ_from_hidden_size_by_heads() -> None:
    assert architectures.read_shape({**LLAMA, "head_dim": 48}).head_size == 48


def test_silence_means_what_transformers_assumes() -> None:
    silent = {key: LLAMA[key] for key in ("architectures", "vocab_size", "hidden_size", "intermediate_size")}
    shape = architectures.read_shape({**silent, "num_hidden_layers": 2, "num_attention_heads": 4})
    assert shape.key_value_heads == 4
    assert shape.context_length == 2048
    assert shape.norm_epsilon == 1e-6
    assert shape.rope == Rope(10_000.0)
    assert not shape.tied_embeddings


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope_theta": 500.0}, Rope(500.0)),
        ({"rope_theta": 500.0, "rope_scaling": None}, Rope(500.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, Rope(7.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, Rope(20000.0, "linear", 2.0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, Rope(20000.0, "linear", 2.0)),
        ({"rope_scaling": LLAMA3}, Rope(20000.0, "llama3", 8.0, 1.0, 4.0, 64)),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, Rope(5e5, "llama3", 8.0, 1.0, 4.0, 64)),
    ],
)
def test_rope_is_read_in_both_spellings(fields: dict[str, Any], rope: Rope) -> None:
    assert architectures.read_shape({**LLAMA, **fields}).rope == rope


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"architectures": ["MambaForCausalLM"]}, "LlamaForCausalLM, MistralForCausalLM"),
        ({"architectures": None}, "LlamaForCausalLM, MistralForCausalLM"),
        ({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}, "exactly one of"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ArchitectureUnsupported, match=named):
        architectures.read_shape({**LLAMA, **fields})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_attention_heads": 5}, "head_dim"),
        ({"num_attention_heads": 3, "head_dim": 16}, "num_key_value_heads"),
        ({"head_dim": 15}, "even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}}, "original_max_position_embeddings"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_a_config_that_contradicts_itself_is_invalid(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointInvalid, match=named):
        architectures.read_shape({**LLAMA, **fields})


@pytest.mark.parametrize(
    ("fields", "window"),
    [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 64}, 64)],
)
def test_mistral_keeps_its_window(fields: dict[str, Any], window: int | None) -> None:
    shape = architectures.read_shape({**LLAMA, "architectures": ["MistralForCausalLM"], **fields})
    assert shape.attention_window == window
    assert shape.family == "mistral"


def test_every_refusal_is_a_sentence_for_a_person() -> None:
    with pytest.raises(EdgeKilnError) as caught:
        architectures.read_shape({**LLAMA, "hidden_act": "gelu"})
    assert caught.value.message == (
        "config.json: 'hidden_act' is 'gelu', which is not supported for the llama family; only 'silu' is."
    )
