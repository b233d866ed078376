"""The Phi-3 family: `Phi3ForCausalLM` (Phi-3, Phi-3.5, Phi-4-mini). Pure.

A Llama whose projections are stored fused, with heads of which a part may turn, and wavelengths that transformers
changes once a text grows beyond the original context. A graph cannot change them, so that the original context is
the longest that is offered. Called through `workers.convert.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.convert.architectures.config_reader import ConfigReader, Defaults, invalid, read_decoder, read_windows
from workers.convert.architectures.rotary import read_rope, read_rotary_channels
from workers.convert.architectures.shape import DecoderShape, TensorNames

_NAMES = TensorNames(attention_inputs=("self_attn.qkv_proj",), feed_forward_inputs=("mlp.gate_up_proj",))


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the shape of a Phi-3 checkpoint; raises as `llama.read_shape` does."""
    reader = ConfigReader(config, "phi3")
    reader.require_off("attention_bias", "mlp_bias", "lm_head_bias")
    head_size = reader.read_size("head_dim", reader.read_size("hidden_size") // reader.read_size("num_attention_heads"))
    turning = read_rotary_channels(reader, head_size)
    rope = read_rope(reader, kinds=("longrope",))
    context_length = reader.read_size("max_position_embeddings", 4096)
    if rope.kind == "longrope":
        if len(rope.wavelength_factors) * 2 != turning:
            raise invalid(
                f"'short_factor' lists {len(rope.wavelength_factors)} wavelengths, but {turning} channels turn.",
                "rope_scaling",
            )
        context_length = min(context_length, rope.original_context_length)
    window = None if reader.config.get("sliding_window") is None else reader.read_size("sliding_window")
    return read_decoder(
        reader,
        "Phi3ForCausalLM",
        Defaults(norm_epsilon=1e-5),
        activation=reader.read_activation("hidden_act", "silu", "silu"),
        head_size=head_size,
        rope=rope,
        rotary_channels=turning,
        context_length=context_length,
        windows=read_windows(reader, ("full_attention" if window is None else "sliding_attention",), window),
        names=_NAMES,
    )
