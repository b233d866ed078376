"""The Gemma 3n text family: `Gemma3nForCausalLM`. Pure.

Several streams of activations, an embedding per layer, and later layers that share the caches of earlier ones: only
the exporter of transformers models converts it, so that its weights are listed here and its layers are not described.
Called through `workers.convert.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.convert.architectures.config_reader import ConfigReader, Defaults, invalid, read_decoder, require_layers
from workers.convert.architectures.shape import DecoderShape

Tensors = dict[str, tuple[int, ...]]


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the sizes and the weights of a Gemma 3n text checkpoint; raises as `llama.read_shape` does."""
    reader = ConfigReader(config, "gemma3n_text")
    reader.require_off("attention_bias")
    layers = require_layers(reader)
    sizes = reader.get("intermediate_size", 16_384)
    sizes = sizes if isinstance(sizes, list) else [sizes] * layers
    if len(sizes) != layers or not all(type(size) is int and 0 < size <= 2**19 for size in sizes):
        raise invalid(f"'intermediate_size' must be a whole number, or one for each of {layers}.", "intermediate_size")
    return read_decoder(
        reader,
        "Gemma3nForCausalLM",
        Defaults(context_length=32_768, tied_embeddings=True, head_size=256, key_value_heads=2),
        intermediate_size=max(sizes),
        rope=None,
        tensors=tuple(_list_tensors(reader, layers, sizes).items()),
    )


def _list_tensors(reader: ConfigReader, layers: int, sizes: list[int]) -> Tensors:
    hidden, vocabulary = reader.read_size("hidden_size"), reader.read_size("vocab_size")
    extra = reader.read_size("hidden_size_per_layer_input", 256)
    streams = min(reader.read_size("altup_num_inputs", 4), 64)
    tensors: Tensors = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.embed_tokens_per_layer.weight": (
            reader.read_size("vocab_size_per_layer_input", 262_144),
            layers * extra,
        ),
        "model.per_layer_model_projection.weight": (layers * extra, hidden),
        "model.per_layer_projection_norm.weight": (extra,),
        "model.norm.weight": (hidden,),
    }
    for stream in range(streams - 1):
        tensors[f"model.altup_projections.{stream}.weight"] = (hidden, hidden)
        tensors[f"model.altup_unembed_projections.{stream}.weight"] = (hidden, hidden)
    shared = read_shared_layers(reader, layers, default=15)
    for layer, size in enumerate(sizes):
        prefix = f"model.layers.{layer}."
        tensors |= list_gemma_layer(
            prefix,
            hidden,
            size,
            reader.read_size("num_attention_heads"),
            reader.read_size("num_key_value_heads", 2),
            reader.read_size("head_dim", 256),
            has_cache=layer < layers - shared,
        )
        tensors |= list_layer_inputs(prefix, hidden, extra)
        tensors |= _list_streams(prefix, hidden, streams, reader.read_size("laurel_rank", 64))
    if not reader.read_flag("tie_word_embeddings", default=True):
        tensors["lm_head.weight"] = (vocabulary, hidden)
    return tensors


def read_shared_layers(reader: ConfigReader, layers: int, default: int) -> int:
    """Return how many of the last layers have no cache of their own."""
    shared = reader.get("num_kv_shared_layers", default)
    if type(shared) is not int or not 0 <= shared < layers:
        raise invalid(
            f"'num_kv_shared_layers' must be a whole number below {layers}, not {shared!r}.", "num_kv_shared_layers"
        )
    return shared


def list_gemma_layer(
    prefix: str, hidden: int, inner: int, heads: int, key_value_heads: int, head_size: int, *, has_cache: bool
) -> Tensors:
    """Return what a layer of any later Gemma holds."""
    tensors: Tensors = {
        f"{prefix}{name}_layernorm.weight": (hidden,)
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
    }
    tensors |= {
        f"{prefix}mlp.gate_proj.weight": (inner, hidden),
        f"{prefix}mlp.up_proj.weight": (inner, hidden),
        f"{prefix}mlp.down_proj.weight": (hidden, inner),
        f"{prefix}self_attn.q_proj.weight": (heads * head_size, hidden),
        f"{prefix}self_attn.o_proj.weight": (hidden, heads * head_size),
        f"{prefix}self_attn.q_norm.weight": (head_size,),
    }
    if has_cache:
        tensors |= {
            f"{prefix}self_attn.k_proj.weight": (key_value_heads * head_size, hidden),
            f"{prefix}self_attn.v_proj.weight": (key_value_heads * head_size, hidden),
            f"{prefix}self_attn.k_norm.weight": (head_size,),
        }
    return tensors


def list_layer_inputs(prefix: str, hidden: int, extra: int) -> Tensors:
    """Return what a layer needs to take in its own embedding."""
    return {
        f"{prefix}per_layer_input_gate.weight": (extra, hidden),
        f"{prefix}per_layer_projection.weight": (hidden, extra),
        f"{prefix}post_per_layer_input_norm.weight": (hidden,),
    }


def _list_streams(prefix: str, hidden: int, streams: int, rank: int) -> Tensors:
    return {
        f"{prefix}altup.correct_output_scale": (hidden,),
        f"{prefix}altup.correction_coefs.weight": (streams, streams),
        f"{prefix}altup.modality_router.weight": (streams, hidden),
        f"{prefix}altup.prediction_coefs.weight": (streams * streams, streams),
        f"{prefix}altup.router_norm.weight": (hidden,),
        f"{prefix}laurel.linear_left.weight": (rank, hidden),
        f"{prefix}laurel.linear_right.weight": (hidden, rank),
        f"{prefix}laurel.post_laurel_norm.weight": (hidden,),
    }
