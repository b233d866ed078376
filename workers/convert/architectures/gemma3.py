"""The Gemma 3 text family: `Gemma3ForCausalLM`. Pure.

A Gemma 2 that norms queries and keys instead of limiting scores, with a window in five layers of six, where
positions turn faster. The graph derives the window's mask from positions, so that the runtime's one mask suffices.
Called through `workers.convert.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from workers.convert.architectures.config_reader import ConfigReader, invalid, read_windows
from workers.convert.architectures.gemma import read_gemma_like
from workers.convert.architectures.gemma2 import SANDWICH_NAMES
from workers.convert.architectures.rotary import read_rope_of, read_rope_settings
from workers.convert.architectures.shape import DecoderShape, Rope

_NAMES = replace(SANDWICH_NAMES, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
_DEFAULT_QUERY_SCALAR = 256
_DEFAULT_WINDOW = 4096
_DEFAULT_PATTERN = 6


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the shape of a Gemma 3 text checkpoint; raises as `llama.read_shape` does."""
    reader = ConfigReader(config, "gemma3_text")
    window = reader.read_size("sliding_window", _DEFAULT_WINDOW)
    pattern = min(reader.read_size("sliding_window_pattern", _DEFAULT_PATTERN), 256)
    windows = read_windows(reader, ("sliding_attention",) * (pattern - 1) + ("full_attention",), window)
    return read_gemma_like(
        reader,
        "Gemma3ForCausalLM",
        131_072,
        activation=reader.read_activation("hidden_activation", "gelu_pytorch_tanh", "gelu_tanh"),
        rope=_read_rope(reader, "full_attention", "rope_theta", 1e6),
        local_rope=_read_rope(reader, "sliding_attention", "rope_local_base_freq", 1e4),
        windows=windows,
        attention_scale=reader.read_positive("query_pre_attn_scalar", _DEFAULT_QUERY_SCALAR) ** -0.5,
        attention_softcap=reader.read_optional("attn_logit_softcapping"),
        output_softcap=reader.read_optional("final_logit_softcapping"),
        names=_NAMES,
    )


def _read_rope(reader: ConfigReader, kind: str, theta_field: str, default_theta: float) -> Rope:
    """Read one kind's positions: nested by kind (transformers 5), or two bases and one scaling (transformers 4)."""
    field, settings = read_rope_settings(reader)
    if field == "rope_parameters":
        settings = settings.get(kind) or {}
        if not isinstance(settings, Mapping):
            raise invalid(f"'{field}.{kind}' must be an object, not {settings!r}.", field)
    elif kind == "sliding_attention":
        settings = {}
    theta = settings.get("rope_theta", reader.get(theta_field, default_theta))
    return read_rope_of(reader, field, settings, theta, ("linear",))
