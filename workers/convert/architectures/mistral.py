"""The Mistral family: `MistralForCausalLM`. Pure.

Mistral computes what Llama computes, except that its first version attends to a window of recent tokens. A
window is no difference as long as the context fits into it; the engines refuse a longer context. Called
through `workers.convert.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.convert.architectures.config_reader import ConfigReader, Defaults, read_decoder
from workers.convert.architectures.rotary import read_rope, require_full_rotary
from workers.convert.architectures.shape import DecoderShape

#: What transformers assumes where a `config.json` does not name the field; an explicit null means no window.
_DEFAULT_WINDOW = 4096


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the shape of a Mistral checkpoint; raises as `llama.read_shape` does."""
    reader = ConfigReader(config, "mistral")
    window: int | None = None
    if config.get("sliding_window", _DEFAULT_WINDOW) is not None:
        window = reader.read_size("sliding_window", _DEFAULT_WINDOW)
    require_full_rotary(reader)
    return read_decoder(
        reader,
        "MistralForCausalLM",
        Defaults(context_length=4096 * 32, key_value_heads=8),
        activation=reader.read_activation("hidden_act", "silu", "silu"),
        rope=read_rope(reader),
        attention_window=window,
    )
