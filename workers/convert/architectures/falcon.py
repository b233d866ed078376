"""The Falcon family: `FalconForCausalLM` (Falcon 1B, 7B, 40B and their like). Pure.

Layer norms, one ungated feed-forward, beside attention or after it, and rotary positions or slopes over the
distance. Called through `workers.convert.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from workers.convert.architectures.config_reader import ConfigReader, Defaults, read_decoder
from workers.convert.architectures.rotary import read_rope, require_full_rotary
from workers.convert.architectures.shape import DecoderShape, TensorNames

_NAMES = TensorNames(
    prefix="transformer.",
    layer="h.{}.",
    embedding="word_embeddings",
    final_norm="ln_f",
    attention_inputs=("self_attention.query_key_value",),
    attention_output="self_attention.dense",
    feed_forward_norm=None,
    feed_forward_inputs=("mlp.dense_h_to_4h",),
    feed_forward_output="mlp.dense_4h_to_h",
)


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the shape of a Falcon checkpoint; raises as `llama.read_shape` does."""
    reader = ConfigReader(config, "falcon")
    require_full_rotary(reader)
    hidden_size = reader.read_size("hidden_size")
    heads = reader.read_size("num_attention_heads")
    is_new = reader.read_flag("new_decoder_architecture", default=False)
    is_parallel = is_new or reader.read_flag("parallel_attn", default=True)
    bias = reader.read_flag("bias", default=False)
    has_alibi = reader.read_flag("alibi", default=False)
    if is_new:
        key_value_heads = reader.read_size("num_kv_heads", heads)
    else:
        key_value_heads = 1 if reader.read_flag("multi_query", default=True) else heads
    return read_decoder(
        reader,
        "FalconForCausalLM",
        Defaults(tied_embeddings=True),
        key_value_heads=key_value_heads,
        head_size=hidden_size // heads,
        intermediate_size=reader.read_size("ffn_hidden_size", 4 * hidden_size),
        activation=reader.read_activation("activation", "gelu", "gelu", "gelu_tanh"),
        is_gated=False,
        is_parallel=is_parallel,
        norm="layer",
        norm_epsilon=reader.read_positive("layer_norm_epsilon", 1e-5),
        rope=None if has_alibi else read_rope(reader),
        has_alibi=has_alibi,
        attention_bias=bias,
        attention_output_bias=bias,
        feed_forward_bias=bias,
        is_grouped=True,
        names=_choose_names(reader, is_new, is_parallel),
    )


def _choose_names(reader: ConfigReader, is_new: bool, is_parallel: bool) -> TensorNames:
    if not is_parallel:
        return replace(_NAMES, feed_forward_norm="post_attention_layernorm")
    norms = reader.get("num_ln_in_parallel_attn", 2 if is_new else 1)
    if norms not in ((1, 2) if is_new else (1,)):
        raise reader.refuse("num_ln_in_parallel_attn", norms, "only 1 is, or 2 with 'new_decoder_architecture'")
    return replace(_NAMES, attention_norm="ln_attn", feed_forward_norm="ln_mlp") if norms == 2 else _NAMES
