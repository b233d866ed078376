"""What the families read from a config.json beyond what Llama says, and what they refuse by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from service.errors import ArchitectureUnsupported, CheckpointInvalid
from workers.convert import architectures
from workers.convert.architectures import FAMILIES, UNCONVERTIBLE, DecoderShape
from workers.convert.architectures.parameters import list_parameters
from workers.fetch.decoder_weights import list_tensors

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
#: What families demand beyond that, under their own names.
OWN: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_embd": 64, "n_layer": 3, "n_head": 4},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 1},
    "OpenELMForCausalLM": {
        "num_query_heads": [1, 4, 3], "num_kv_heads": [1, 2, 3], "ffn_multipliers": [0.5, 1, 2.3], "head_dim": 16,
        "ffn_dim_divisor": 16, "model_dim": 64, "num_transformer_layers": 3, "max_context_length": 256,
    },
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 128,
}


def read(architecture: str, **fields: Any) -> DecoderShape:
    return architectures.read_shape({**SIZES, "architectures": [architecture], **OWN.get(architecture, {}), **fields})


def test_every_family_reads_the_common_sizes() -> None:
    for architecture in FAMILIES:
        shape = read(architecture)
        assert (shape.architecture, shape.family) == (architecture, FAMILIES[architecture].name)
        assert (shape.vocabulary_size, shape.hidden_size, shape.layers, shape.heads) == (512, 64, 3, 4)
        assert len(list_tensors(shape)) > 10


def test_tensors_fill_each_parameter_of_a_rebuilt_model_once() -> None:
    for architecture, family in FAMILIES.items():
        if "reauthored" in family.engines:
            parameters = list(list_parameters(read(architecture)))
            tensors = [name for parameter in parameters for name, _ in parameter.tensors]
            assert len({parameter.name for parameter in parameters}) == len(parameters)
            assert len(set(tensors)) == len(tensors)


def test_openelm_has_sizes_of_its_own_in_every_layer() -> None:
    shape = read("OpenELMForCausalLM")
    sizes = [shape.find_sizes(layer) for layer in range(3)]
    assert [(each.heads, each.key_value_heads) for each in sizes] == [(1, 1), (4, 2), (3, 3)]
    # 32, 64 and 147.2 as multiples of 16.
    assert [each.intermediate_size for each in sizes] == [32, 64, 144]
    assert (shape.heads, shape.key_value_heads, shape.intermediate_size) == (4, 3, 144)
    tensors = list_tensors(shape)
    assert tensors["transformer.layers.2.attn.qkv_proj.weight"] == (9 * 16, 64)
    assert tensors["transformer.layers.2.ffn.proj_1.weight"] == (2 * 144, 64)
    # A tenth less than asked for is too little: 20 becomes 32, and not 16.
    assert read("OpenELMForCausalLM", ffn_multipliers=[0.3125, 1, 1]).find_sizes(0).intermediate_size == 32


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"num_query_heads": [4, 4]}, CheckpointInvalid, "'num_query_heads' must list one number for each of the 3"),
        ({"num_kv_heads": 2}, CheckpointInvalid, "'num_kv_heads' must list"),
        (
            {"num_kv_heads": [1, 3, 3]},
            CheckpointInvalid,
            r"layer 1 \(4\) is not a multiple of its 'num_kv_heads' \(3\)",
        ),
        ({"num_query_heads": [1, 0, 3]}, CheckpointInvalid, "of layer 1 must be a whole number"),
        ({"ffn_multipliers": [1, 1, -1]}, CheckpointInvalid, "'ffn_multipliers' must be a finite number above 0"),
        ({"normalization_layer_name": "layer_norm"}, ArchitectureUnsupported, "'layer_norm'"),
        ({"activation_fn_name": "relu"}, ArchitectureUnsupported, "'relu'"),
    ],
)
def test_openelm_refuses_what_it_is_not(fields: dict[str, Any], code: type[Exception], said: str) -> None:
    with pytest.raises(code, match=said):
        read("OpenELMForCausalLM", **fields)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({}, ()),
        ({"sliding_window": 32}, ()),
        ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, (None, 32, 32)),
        ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 28}, ()),
        (
            {"use_sliding_window": True, "sliding_window": 32,
             "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
            (32, None, None),
        ),
    ],
)  # fmt: skip
def test_qwen_has_windows_only_when_it_says_so(fields: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert read("Qwen2ForCausalLM", **fields).windows == windows
    assert read("Qwen3ForCausalLM", **fields).windows == windows


def test_gemma3_reads_both_spellings_of_its_positions() -> None:
    old = read(
        "Gemma3ForCausalLM", rope_theta=5e5, rope_local_base_freq=2e4, rope_scaling={"rope_type": "linear", "factor": 8}
    )
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    new = read("Gemma3ForCausalLM", rope_parameters=nested)
    assert (old.rope, old.local_rope) == (new.rope, new.local_rope)
    assert old.find_rope(0) == old.local_rope != old.rope
    silent = read("Gemma3ForCausalLM", num_hidden_layers=7)
    assert silent.rope is not None
    assert (silent.rope.theta, silent.windows) == (1e6, (4096,) * 5 + (None, 4096))
    assert (silent.embedding_scale, silent.attention_scale, silent.norm_offset) == (8.0, 256**-0.5, 1.0)


def test_gemma2_defaults_to_its_soft_limits() -> None:
    shape = read("Gemma2ForCausalLM")
    assert (shape.attention_softcap, shape.output_softcap, shape.windows) == (50.0, 30.0, (4096, None, 4096))
    shape = read("Gemma2ForCausalLM", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (shape.attention_softcap, shape.output_softcap) == (None, None)


def test_the_first_gemma_calls_the_tanh_approximation_gelu() -> None:
    assert read("GemmaForCausalLM", hidden_act="gelu").activation == "gelu_tanh"


def test_phi3_offers_no_context_in_which_its_wavelengths_change() -> None:
    shape = read("Phi3ForCausalLM", rope_scaling=LONGROPE)
    assert shape.rope is not None
    assert shape.context_length == 128
    assert shape.rope.amplitude == math.sqrt(1 + math.log(2) / math.log(128))
    assert read("Phi3ForCausalLM", rope_scaling=LONGROPE, max_position_embeddings=128).context_length == 128


def test_gemma4_widens_its_heads_where_nothing_is_out_of_sight() -> None:
    fields = {"head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 0}
    types = ["sliding_attention", "full_attention", "full_attention"]
    old = dict(read("Gemma4ForCausalLM", layer_types=types, **fields).tensors)
    own = {"1": {"head_dim": 32}, "2": {"head_dim": 32}}
    new = dict(read("Gemma4ForCausalLM", per_layer_config=own, **fields).tensors)
    assert old == new
    assert [old[f"model.layers.{layer}.self_attn.q_norm.weight"] for layer in range(3)] == [(16,), (32,), (32,)]


@pytest.mark.parametrize(
    ("architecture", "fields", "named"),
    [
        ("Qwen2ForCausalLM", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ("Qwen2ForCausalLM", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'rope_scaling.rope_type' is 'yarn'"),
        (
            "Qwen2ForCausalLM",
            {"layer_types": ["full_attention", "full_attention", "mamba"]},
            "'layer_types' is 'mamba'",
        ),
        ("Qwen3ForCausalLM", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("GemmaForCausalLM", {"hidden_act": "silu"}, "'hidden_act' is 'silu'"),
        ("GemmaForCausalLM", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True"),
        ("Gemma2ForCausalLM", {"hidden_activation": "relu"}, "'hidden_activation' is 'relu'"),
        ("Gemma3ForCausalLM", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True"),
        ("PhiForCausalLM", {"qk_layernorm": True}, "'qk_layernorm' is True"),
        ("PhiForCausalLM", {"hidden_act": ["gelu"]}, "'hidden_act' is \\['gelu'\\]"),
        ("Phi3ForCausalLM", {"attention_bias": True}, "'attention_bias' is True"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "su", "factor": 4.0}}, "'su'"),
        ("FalconForCausalLM", {"num_ln_in_parallel_attn": 2}, "'num_ln_in_parallel_attn' is 2"),
        ("FalconForCausalLM", {"activation": "silu"}, "'activation' is 'silu'"),
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' is True"),
        ("GPT2LMHeadModel", {"add_cross_attention": True}, "'add_cross_attention' is True"),
        ("Gemma4ForCausalLM", {"enable_moe_block": True}, "'enable_moe_block' is True"),
        ("Gemma4ForCausalLM", {"attention_k_eq_v": True}, "'attention_k_eq_v' is True"),
        ("Gemma4ForCausalLM", {"per_layer_config": {"1": {"num_key_value_heads": 1}}}, "num_key_value_heads' is 1"),
        ("Gemma3nForCausalLM", {"attention_bias": True}, "'attention_bias' is True"),
        ("Lfm2ForCausalLM", {"pad_token_id": 5}, "'pad_token_id' is 5"),
        ("Lfm2ForCausalLM", {"layer_types": ["conv", "conv", "moe"]}, "'layer_types' is 'moe'"),
    ],
)
def test_what_would_change_the_result_is_refused_with_field_and_value(
    architecture: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(ArchitectureUnsupported, match=named):
        read(architecture, **fields)


@pytest.mark.parametrize(
    ("architecture", "fields", "named"),
    [
        ("Qwen2ForCausalLM", {"num_hidden_layers": 10**12}, "at most 256"),
        ("Gemma3ForCausalLM", {"num_hidden_layers": 10**12}, "at most 256"),
        ("Gemma3nForCausalLM", {"num_hidden_layers": 10**12}, "at most 256"),
        ("Gemma4ForCausalLM", {"num_hidden_layers": 10**12}, "at most 256"),
        ("Lfm2ForCausalLM", {"num_hidden_layers": 10**12}, "at most 256"),
        ("Qwen2ForCausalLM", {"layer_types": ["full_attention"]}, "one type for each of the 3 layers"),
        ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention"] * 3}, "'sliding_window' is not given"),
        ("Gemma3ForCausalLM", {"rope_parameters": {"full_attention": "linear"}}, "must be an object"),
        ("PhiForCausalLM", {"partial_rotary_factor": 0.05}, "need an even number"),
        ("PhiForCausalLM", {"partial_rotary_factor": 2.0}, "need an even number"),
        ("Phi3ForCausalLM", {"rope_scaling": {**LONGROPE, "short_factor": [1.0]}}, "lists 1 wavelengths, but 16"),
        ("Phi3ForCausalLM", {"rope_scaling": {**LONGROPE, "short_factor": None}}, "short_factor"),
        ("Gemma3nForCausalLM", {"intermediate_size": [128, 128]}, "one for each of 3"),
        ("Gemma3nForCausalLM", {"num_kv_shared_layers": 3}, "below 3"),
        ("Gemma4ForCausalLM", {"per_layer_config": [1]}, "per_layer_config"),
        ("Lfm2ForCausalLM", {"full_attn_idxs": 1}, "full_attn_idxs"),
    ],
)
def test_a_config_that_contradicts_itself_is_invalid(architecture: str, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointInvalid, match=named):
        read(architecture, **fields)


@pytest.mark.parametrize("architecture", UNCONVERTIBLE)
def test_what_no_engine_converts_is_refused_with_its_reason(architecture: str) -> None:
    with pytest.raises(ArchitectureUnsupported, match="no engine converts") as caught:
        read(architecture)
    assert UNCONVERTIBLE[architecture] in caught.value.message
