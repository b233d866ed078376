"""The Granite family: `GraniteForCausalLM`. Pure.

Stored as a Llama, with factors on embeddings, scores, residuals and logits: only the exporter of transformers models
converts it. Called through `workers.convert.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.convert.architectures.config_reader import ConfigReader, Defaults, read_decoder, require_layers
from workers.convert.architectures.parameters import leave_undescribed
from workers.convert.architectures.shape import DecoderShape


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the sizes and the weights of a Granite checkpoint; raises as `llama.read_shape` does."""
    reader = ConfigReader(config, "granite")
    require_layers(reader)
    attention_bias = reader.read_flag("attention_bias", default=False)
    return leave_undescribed(
        read_decoder(
            reader,
            "GraniteForCausalLM",
            Defaults(),
            rope=None,
            attention_bias=attention_bias,
            attention_output_bias=attention_bias,
            feed_forward_bias=reader.read_flag("mlp_bias", default=False),
        )
    )
