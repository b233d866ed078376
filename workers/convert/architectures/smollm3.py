"""The SmolLM3 family: `SmolLM3ForCausalLM`. Pure.

Stored as a Llama, but in some layers no positions turn: only the exporter of transformers models converts it. Called
through `workers.convert.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.convert.architectures.config_reader import ConfigReader, Defaults, read_decoder, require_layers
from workers.convert.architectures.parameters import leave_undescribed
from workers.convert.architectures.shape import DecoderShape


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the sizes and the weights of a SmolLM3 checkpoint; raises as `llama.read_shape` does."""
    reader = ConfigReader(config, "smollm3")
    reader.require_off("use_sliding_window")
    require_layers(reader)
    attention_bias = reader.read_flag("attention_bias", default=False)
    return leave_undescribed(
        read_decoder(
            reader,
            "SmolLM3ForCausalLM",
            Defaults(context_length=32_768, tied_embeddings=True, key_value_heads=4),
            rope=None,
            attention_bias=attention_bias,
            attention_output_bias=attention_bias,
            feed_forward_bias=reader.read_flag("mlp_bias", default=False),
        )
    )
