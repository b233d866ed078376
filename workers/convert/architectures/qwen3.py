"""The Qwen3 family: `Qwen3ForCausalLM`. Pure.

A Llama that norms each head's queries and keys. Called through `workers.convert.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.convert.architectures.config_reader import ConfigReader, Defaults, read_decoder
from workers.convert.architectures.qwen2 import read_qwen_windows
from workers.convert.architectures.rotary import read_rope, require_full_rotary
from workers.convert.architectures.shape import DecoderShape, TensorNames

_NAMES = TensorNames(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the shape of a Qwen3 checkpoint; raises as `llama.read_shape` does."""
    reader = ConfigReader(config, "qwen3")
    require_full_rotary(reader)
    bias = reader.read_flag("attention_bias", default=False)
    return read_decoder(
        reader,
        "Qwen3ForCausalLM",
        Defaults(context_length=32768, head_size=128),
        activation=reader.read_activation("hidden_act", "silu", "silu"),
        rope=read_rope(reader),
        attention_bias=bias,
        attention_output_bias=bias,
        windows=read_qwen_windows(reader),
        names=_NAMES,
    )
