"""The Llama family: `LlamaForCausalLM` (Llama 2, 3.x, TinyLlama, SmolLM, AMD-Llama and their like). Pure.

Refuses by name what would change the result silently. Called through `workers.convert.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.convert.architectures.config_reader import ConfigReader, Defaults, read_decoder
from workers.convert.architectures.rotary import read_rope, require_full_rotary
from workers.convert.architectures.shape import DecoderShape


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the shape of a Llama checkpoint.

    Raises `CheckpointInvalid` for fields that contradict themselves and `ArchitectureUnsupported` for a
    choice that no engine reproduces (activation, rope type, pre-quantized weights).
    """
    reader = ConfigReader(config, "llama")
    activation = reader.read_activation("hidden_act", "silu", "silu")
    require_full_rotary(reader)
    attention_bias = reader.read_flag("attention_bias", default=False)
    return read_decoder(
        reader,
        "LlamaForCausalLM",
        Defaults(),
        activation=activation,
        rope=read_rope(reader),
        attention_bias=attention_bias,
        attention_output_bias=attention_bias,
        feed_forward_bias=reader.read_flag("mlp_bias", default=False),
    )
