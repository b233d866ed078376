"""The GPT-2 family: `GPT2LMHeadModel`. Pure.

Learned positions, layer norms, biases everywhere, and matrices stored as [inputs, outputs]. Called through
`workers.convert.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.convert.architectures.config_reader import ConfigReader, Defaults, read_decoder
from workers.convert.architectures.shape import DecoderShape, TensorNames

_NAMES = TensorNames(
    prefix="transformer.",
    layer="h.{}.",
    embedding="wte",
    positions="wpe",
    final_norm="ln_f",
    attention_norm="ln_1",
    attention_inputs=("attn.c_attn",),
    attention_output="attn.c_proj",
    feed_forward_norm="ln_2",
    feed_forward_inputs=("mlp.c_fc",),
    feed_forward_output="mlp.c_proj",
)

#: Its own names of fields that most families share.
_FIELDS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
}


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the shape of a GPT-2 checkpoint; raises as `llama.read_shape` does."""
    named = {common: config[own] for own, common in _FIELDS.items() if own in config}
    reader = ConfigReader({**config, **named}, "gpt2")
    reader.require_off("scale_attn_by_inverse_layer_idx", "add_cross_attention")
    is_scaled = reader.read_flag("scale_attn_weights", default=True)
    return read_decoder(
        reader,
        "GPT2LMHeadModel",
        Defaults(context_length=1024, tied_embeddings=True),
        key_value_heads=reader.read_size("num_attention_heads"),
        intermediate_size=reader.read_size("intermediate_size", 4 * reader.read_size("hidden_size")),
        activation=reader.read_activation("activation_function", "gelu_new", "gelu_tanh", "gelu"),
        is_gated=False,
        norm="layer",
        norm_epsilon=reader.read_positive("layer_norm_epsilon", 1e-5),
        rope=None,
        attention_scale=None if is_scaled else 1.0,
        attention_bias=True,
        attention_output_bias=True,
        feed_forward_bias=True,
        is_transposed=True,
        names=_NAMES,
    )
