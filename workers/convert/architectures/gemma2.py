"""The Gemma 2 family: `Gemma2ForCausalLM`. Pure.

A Gemma with norms before and after both halves of a layer, soft limits of scores and logits, and a window in every
second layer. The graph derives the window's mask from positions, so that the runtime's one mask suffices. Called
through `workers.convert.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.convert.architectures.config_reader import ConfigReader, read_windows
from workers.convert.architectures.gemma import read_gemma_like
from workers.convert.architectures.rotary import read_rope
from workers.convert.architectures.shape import DecoderShape, TensorNames

SANDWICH_NAMES = TensorNames(
    attention_output_norm="post_attention_layernorm",
    feed_forward_norm="pre_feedforward_layernorm",
    feed_forward_output_norm="post_feedforward_layernorm",
)
_DEFAULT_QUERY_SCALAR = 256
_DEFAULT_WINDOW = 4096


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the shape of a Gemma 2 checkpoint; raises as `llama.read_shape` does."""
    reader = ConfigReader(config, "gemma2")
    window = reader.read_size("sliding_window", _DEFAULT_WINDOW)
    return read_gemma_like(
        reader,
        "Gemma2ForCausalLM",
        8192,
        activation=reader.read_activation("hidden_activation", "gelu_pytorch_tanh", "gelu_tanh"),
        rope=read_rope(reader),
        windows=read_windows(reader, ("sliding_attention", "full_attention"), window),
        attention_scale=reader.read_positive("query_pre_attn_scalar", _DEFAULT_QUERY_SCALAR) ** -0.5,
        attention_softcap=reader.read_optional("attn_logit_softcapping", 50.0),
        output_softcap=reader.read_optional("final_logit_softcapping", 30.0),
        names=SANDWICH_NAMES,
    )
