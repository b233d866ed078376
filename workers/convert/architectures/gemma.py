"""The Gemma family, first version: `GemmaForCausalLM`. Pure.

A Llama with scaled embeddings, norms that are stored as a difference from one, a GELU, and heads larger than
hidden size by heads. Called through `workers.convert.architectures`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from workers.convert.architectures.config_reader import ConfigReader, Defaults, read_decoder
from workers.convert.architectures.rotary import read_rope, require_full_rotary
from workers.convert.architectures.shape import DecoderShape


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the shape of a Gemma checkpoint; raises as `llama.read_shape` does."""
    # The first releases say "gelu" and mean the tanh approximation, as transformers does.
    completed = {**config, "hidden_act": "gelu_pytorch_tanh"} if config.get("hidden_act") == "gelu" else config
    reader = ConfigReader(completed, "gemma")
    return read_gemma_like(
        reader,
        "GemmaForCausalLM",
        8192,
        activation=reader.read_activation("hidden_act", "gelu_pytorch_tanh", "gelu_tanh"),
        rope=read_rope(reader),
    )


def read_gemma_like(reader: ConfigReader, architecture: str, context_length: int, **choices: Any) -> DecoderShape:
    """Return the shape of any version of Gemma from what all share and the `choices` of one."""
    reader.require_off("use_bidirectional_attention")
    require_full_rotary(reader)
    bias = reader.read_flag("attention_bias", default=False)
    return read_decoder(
        reader,
        architecture,
        Defaults(context_length=context_length, tied_embeddings=True, head_size=256),
        attention_bias=bias,
        attention_output_bias=bias,
        norm_offset=1.0,
        embedding_scale=math.sqrt(reader.read_size("hidden_size")),
        **choices,
    )
