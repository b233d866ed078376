"""The Qwen2 family: `Qwen2ForCausalLM` (Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen and their like). Pure.

A Llama with biases on queries, keys and values, and, in few checkpoints, a window in the later layers. Called
through `workers.convert.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.convert.architectures.config_reader import ConfigReader, Defaults, read_decoder, read_windows
from workers.convert.architectures.rotary import read_rope, require_full_rotary
from workers.convert.architectures.shape import DecoderShape

_DEFAULT_WINDOW = 4096
_DEFAULT_FULL_LAYERS = 28


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the shape of a Qwen2 checkpoint; raises as `llama.read_shape` does."""
    reader = ConfigReader(config, "qwen2")
    require_full_rotary(reader)
    return read_decoder(
        reader,
        "Qwen2ForCausalLM",
        Defaults(context_length=32768),
        activation=reader.read_activation("hidden_act", "silu", "silu"),
        rope=read_rope(reader),
        attention_bias=True,
        windows=read_qwen_windows(reader),
    )


def read_qwen_windows(reader: ConfigReader) -> tuple[int | None, ...]:
    """Return the windows of a Qwen: without `use_sliding_window` there is none, whatever else is said."""
    layers = reader.read_size("num_hidden_layers")
    if not reader.read_flag("use_sliding_window", default=False):
        return read_windows(reader, ("full_attention",), None)
    window = reader.read_size("sliding_window", _DEFAULT_WINDOW)
    full = reader.get("max_window_layers", _DEFAULT_FULL_LAYERS)
    full = min(layers, full) if isinstance(full, int) and full >= 0 else reader.read_size("max_window_layers")
    # read_windows bounds the layers before it walks through them.
    pattern = ("full_attention",) * min(full, 256) + ("sliding_attention",) * min(layers - full, 256)
    return read_windows(reader, pattern, window)
