"""The Phi family, first two versions: `PhiForCausalLM` (Phi-1, Phi-1.5, Phi-2). Pure.

Layer norms, biases everywhere, heads of which a part turns, and a feed-forward beside attention. Called through
`workers.convert.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.convert.architectures.config_reader import ConfigReader, Defaults, read_decoder
from workers.convert.architectures.rotary import read_rope, read_rotary_channels
from workers.convert.architectures.shape import DecoderShape, TensorNames

_NAMES = TensorNames(
    final_norm="final_layernorm",
    attention_output="self_attn.dense",
    feed_forward_norm=None,
    feed_forward_inputs=("mlp.fc1",),
    feed_forward_output="mlp.fc2",
)
_DEFAULT_ROTARY = 0.5


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the shape of a Phi checkpoint; raises as `llama.read_shape` does."""
    reader = ConfigReader(config, "phi")
    reader.require_off("qk_layernorm")
    head_size = reader.read_size("head_dim", reader.read_size("hidden_size") // reader.read_size("num_attention_heads"))
    return read_decoder(
        reader,
        "PhiForCausalLM",
        Defaults(),
        head_size=head_size,
        activation=reader.read_activation("hidden_act", "gelu_new", "gelu_tanh", "gelu"),
        is_gated=False,
        is_parallel=True,
        norm="layer",
        norm_epsilon=reader.read_positive("layer_norm_eps", 1e-5),
        rope=read_rope(reader),
        rotary_channels=read_rotary_channels(reader, head_size, _DEFAULT_ROTARY),
        attention_bias=True,
        attention_output_bias=True,
        feed_forward_bias=True,
        output_bias=True,
        names=_NAMES,
    )
