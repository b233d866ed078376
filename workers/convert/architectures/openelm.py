"""The OpenELM family: `OpenELMForCausalLM`. Pure.

Layers grow with depth: each has its own number of heads, of key-value heads and size of the feed-forward. Called
through `workers.convert.architectures`.

Source: arXiv 2404.14619, section 2.1, and the fields of the published configurations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from workers.convert.architectures.config_reader import ConfigReader, Defaults, invalid, read_decoder, require_layers
from workers.convert.architectures.rotary import read_rope
from workers.convert.architectures.shape import DecoderShape, LayerSizes, TensorNames

_NAMES = TensorNames(
    prefix="transformer.",
    embedding="token_embeddings",
    attention_norm="attn_norm",
    attention_inputs=("attn.qkv_proj",),
    attention_output="attn.out_proj",
    feed_forward_norm="ffn_norm",
    feed_forward_inputs=("ffn.proj_1",),
    feed_forward_output="ffn.proj_2",
)

#: Its own names of fields that most families share.
_FIELDS = {
    "model_dim": "hidden_size",
    "num_transformer_layers": "num_hidden_layers",
    "max_context_length": "max_position_embeddings",
    "rope_freq_constant": "rope_theta",
    "share_input_output_layers": "tie_word_embeddings",
}


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the shape of an OpenELM checkpoint; raises as `llama.read_shape` does."""
    named = {common: config[own] for own, common in _FIELDS.items() if own in config}
    reader = ConfigReader({**config, **named}, "openelm")
    norm, activation = reader.get("normalization_layer_name", "rms_norm"), reader.get("activation_fn_name", "swish")
    if norm != "rms_norm":
        raise reader.refuse("normalization_layer_name", norm, "only 'rms_norm' is")
    if activation not in ("swish", "silu"):
        raise reader.refuse("activation_fn_name", activation, "only 'swish' is")
    sizes = _read_sizes(reader)
    has_norms = reader.read_flag("normalize_qk_projections", default=True)
    return read_decoder(
        reader,
        "OpenELMForCausalLM",
        Defaults(tied_embeddings=True),
        heads=max(each.heads for each in sizes),
        key_value_heads=max(each.key_value_heads for each in sizes),
        intermediate_size=max(each.intermediate_size for each in sizes),
        layer_sizes=sizes,
        head_size=reader.read_size("head_dim"),
        norm_epsilon=1e-6,
        is_gated=reader.read_flag("ffn_with_glu", default=True),
        rope=read_rope(reader),
        names=replace(_NAMES, query_norm="attn.q_norm", key_norm="attn.k_norm") if has_norms else _NAMES,
    )


def _read_sizes(reader: ConfigReader) -> tuple[LayerSizes, ...]:
    layers, hidden_size = require_layers(reader), reader.read_size("hidden_size")
    divisor = reader.read_size("ffn_dim_divisor", 256)
    lists = [_read_list(reader, name, layers) for name in ("num_query_heads", "num_kv_heads", "ffn_multipliers")]
    sizes = []
    for layer, (heads, key_value_heads, multiplier) in enumerate(zip(*lists, strict=True)):
        for name, value in (("num_query_heads", heads), ("num_kv_heads", key_value_heads)):
            if type(value) is not int or not 0 < value <= 1024:
                raise invalid(f"'{name}' of layer {layer} must be a whole number from 1 to 1024, not {value!r}.", name)
        if heads % key_value_heads:
            raise invalid(
                f"'num_query_heads' of layer {layer} ({heads}) is not a multiple of its 'num_kv_heads' "
                f"({key_value_heads}).",
                "num_kv_heads",
            )
        wanted = reader.require_positive("ffn_multipliers", multiplier) * hidden_size
        sizes.append(LayerSizes(heads, key_value_heads, _round_to(divisor, wanted)))
    return tuple(sizes)


def _read_list(reader: ConfigReader, field: str, layers: int) -> list[Any]:
    value = reader.config.get(field)
    if not isinstance(value, list) or len(value) != layers:
        raise invalid(f"{field!r} must list one number for each of the {layers} layers.", field)
    return value


def _round_to(divisor: int, size: float) -> int:
    """Return the multiple of `divisor` nearest to `size`, one more where that is less than nine tenths of it."""
    nearest = max(divisor, int(size + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * size else nearest
