"""The Mistral family: `MistralForCausalLM`. Pure.

Mistral computes what Llama computes, except that its first version attends to a window of recent tokens. A
window is no difference as long as the context fits into it; the engines refuse a longer context. Called
through `workers.convert.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.convert.architectures.llama import read_llama_like
from workers.convert.architectures.shape import ConfigReader, DecoderShape

#: What transformers assumes where a `config.json` does not name the field; an explicit null means no window.
_DEFAULT_WINDOW = 4096


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the shape of a Mistral checkpoint; raises as `llama.read_shape` does."""
    window: int | None = None
    if config.get("sliding_window", _DEFAULT_WINDOW) is not None:
        window = ConfigReader(config, "mistral").read_size("sliding_window", _DEFAULT_WINDOW)
    # Mistral's defaults differ from Llama's where a file is silent.
    completed = {
        "max_position_embeddings": 4096 * 32,
        "num_key_value_heads": 8,
        **config,
        "attention_bias": False,
        "mlp_bias": False,
    }
    return read_llama_like(completed, architecture="MistralForCausalLM", family="mistral", attention_window=window)
