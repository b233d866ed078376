"""The Gemma 4 text family: `Gemma4ForCausalLM`, without experts. Pure.

Heads whose size differs from layer to layer and norms on values: only the exporter of transformers models converts
it, so that its weights are listed here and its layers are not described. Called through
`workers.convert.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.convert.architectures.config_reader import (
    ConfigReader,
    Defaults,
    invalid,
    read_decoder,
    read_windows,
    require_layers,
)
from workers.convert.architectures.gemma3n import Tensors, list_gemma_layer, list_layer_inputs, read_shared_layers
from workers.convert.architectures.shape import DecoderShape

_DEFAULT_TYPES = ("sliding_attention",) * 5 + ("full_attention",)


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the sizes and the weights of a Gemma 4 text checkpoint; raises as `llama.read_shape` does."""
    reader = ConfigReader(config, "gemma4_text")
    reader.require_off("enable_moe_block", "attention_k_eq_v", "attention_bias", "use_bidirectional_attention")
    layers = require_layers(reader)
    head_sizes = _read_head_sizes(reader, layers)
    return read_decoder(
        reader,
        "Gemma4ForCausalLM",
        Defaults(context_length=131_072, tied_embeddings=True, key_value_heads=4),
        head_size=max(head_sizes),
        rope=None,
        tensors=tuple(_list_tensors(reader, head_sizes).items()),
    )


def _read_head_sizes(reader: ConfigReader, layers: int) -> list[int]:
    """Return each layer's: from `per_layer_config`, or `global_head_dim` in the layers without a window."""
    common = reader.read_size("head_dim", 256)
    own = reader.config.get("per_layer_config")
    if own is None:
        windows = read_windows(reader, _DEFAULT_TYPES, reader.read_size("sliding_window", 512)) or (None,) * layers
        wide = reader.read_size("global_head_dim", 512)
        return [wide if window is None or layer == layers - 1 else common for layer, window in enumerate(windows)]
    if not isinstance(own, Mapping) or not all(isinstance(each, Mapping) for each in own.values()):
        raise invalid("'per_layer_config' must map the numbers of layers to objects.", "per_layer_config")
    for layer, each in own.items():
        for name in each.keys() - {"head_dim"}:
            raise reader.refuse(f"per_layer_config.{layer}.{name}", each[name], "only 'head_dim' may differ")
    sizes = [own.get(str(layer), {}).get("head_dim", common) for layer in range(layers)]
    if not all(type(size) is int and 0 < size <= 2**12 for size in sizes):
        raise invalid("'head_dim' in 'per_layer_config' must be a whole number of at least 1.", "per_layer_config")
    return sizes


def _list_tensors(reader: ConfigReader, head_sizes: list[int]) -> Tensors:
    hidden, vocabulary = reader.read_size("hidden_size"), reader.read_size("vocab_size")
    inner, layers = reader.read_size("intermediate_size"), len(head_sizes)
    extra = reader.get("hidden_size_per_layer_input", 256)
    extra = reader.read_size("hidden_size_per_layer_input", 256) if extra != 0 else 0
    tensors: Tensors = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if extra:
        rows = reader.read_size("vocab_size_per_layer_input", 262_144)
        tensors |= {
            "model.embed_tokens_per_layer.weight": (rows, layers * extra),
            "model.per_layer_model_projection.weight": (layers * extra, hidden),
            "model.per_layer_projection_norm.weight": (extra,),
        }
    shared = read_shared_layers(reader, layers, default=0)
    is_double = reader.read_flag("use_double_wide_mlp", default=False)
    for layer, head_size in enumerate(head_sizes):
        prefix, has_cache = f"model.layers.{layer}.", layer < layers - shared
        tensors |= list_gemma_layer(
            prefix,
            hidden,
            inner * 2 if is_double and not has_cache else inner,
            reader.read_size("num_attention_heads"),
            reader.read_size("num_key_value_heads", 4),
            head_size,
            has_cache=has_cache,
        )
        tensors[f"{prefix}layer_scalar"] = (1,)
        if extra:
            tensors |= list_layer_inputs(prefix, hidden, extra)
    if not reader.read_flag("tie_word_embeddings", default=True):
        tensors["lm_head.weight"] = (vocabulary, hidden)
    return tensors
