"""The LFM2 family: `Lfm2ForCausalLM`. Pure.

Short convolutions in place of attention in most layers, with a state beside the caches: only the exporter of
transformers models converts it, so that its weights are listed here and its layers are not described. Called through
`workers.convert.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.convert.architectures.config_reader import (
    ConfigReader,
    Defaults,
    invalid,
    one_of,
    read_decoder,
    require_layers,
)
from workers.convert.architectures.shape import DecoderShape

_KINDS = ("full_attention", "conv")


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the sizes and the weights of an LFM2 checkpoint; raises as `llama.read_shape` does."""
    # transformers lets the older names of two fields go first.
    older = {"tie_embedding": "tie_word_embeddings", "block_ff_dim": "intermediate_size"}
    reader = ConfigReader({**config, **{new: config[old] for old, new in older.items() if old in config}}, "lfm2")
    # The graph keeps tokens of this id out of the state, and the runtime pads with zeros.
    padding = reader.get("pad_token_id", 0)
    if padding not in (0, -1):
        raise reader.refuse("pad_token_id", padding, "only 0 is, with which the runtime pads")
    kinds = _read_kinds(reader)
    inner = _read_inner_size(reader)
    return read_decoder(
        reader,
        "Lfm2ForCausalLM",
        Defaults(context_length=128_000, tied_embeddings=True, key_value_heads=8),
        intermediate_size=inner,
        norm_epsilon=reader.read_positive("norm_eps", 1e-5),
        rope=None,
        tensors=tuple(_list_tensors(reader, kinds, inner).items()),
    )


def _read_kinds(reader: ConfigReader) -> list[str]:
    layers = require_layers(reader)
    with_attention = reader.get("full_attn_idxs", list(range(layers)))
    if not isinstance(with_attention, list):
        raise invalid("'full_attn_idxs' must be a list of numbers of layers.", "full_attn_idxs")
    kinds = reader.get(
        "layer_types", ["full_attention" if each in with_attention else "conv" for each in range(layers)]
    )
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise invalid(f"'layer_types' must list one type for each of the {layers} layers.", "layer_types")
    for kind in kinds:
        if kind not in _KINDS:
            raise reader.refuse("layer_types", kind, one_of([repr(each) for each in _KINDS]))
    return kinds


def _read_inner_size(reader: ConfigReader) -> int:
    """Return the size that transformers computes. Source: `modeling_lfm2.py`, `Lfm2MLP`."""
    inner = reader.read_size("intermediate_size", 12_288)
    if not reader.read_flag("block_auto_adjust_ff_dim", default=True):
        return inner
    inner = int(2 * inner / 3)
    multiplier = reader.config.get("block_ffn_dim_multiplier", 1.0)
    if multiplier is None:
        return inner
    multiple = reader.read_size("block_multiple_of", 256)
    inner = int(reader.require_positive("block_ffn_dim_multiplier", multiplier) * inner)
    return multiple * ((inner + multiple - 1) // multiple)


def _list_tensors(reader: ConfigReader, kinds: list[str], inner: int) -> dict[str, tuple[int, ...]]:
    hidden, vocabulary = reader.read_size("hidden_size"), reader.read_size("vocab_size")
    heads, key_value_heads = reader.read_size("num_attention_heads"), reader.read_size("num_key_value_heads", 8)
    head_size = reader.read_size("head_dim", hidden // heads)
    taps = reader.read_size("conv_L_cache", 3)
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.embedding_norm.weight": (hidden,),
    }
    for layer, kind in enumerate(kinds):
        prefix = f"model.layers.{layer}."
        tensors |= {
            f"{prefix}operator_norm.weight": (hidden,),
            f"{prefix}ffn_norm.weight": (hidden,),
            f"{prefix}feed_forward.w1.weight": (inner, hidden),
            f"{prefix}feed_forward.w3.weight": (inner, hidden),
            f"{prefix}feed_forward.w2.weight": (hidden, inner),
        }
        if kind == "conv":
            tensors |= {
                f"{prefix}conv.in_proj.weight": (3 * hidden, hidden),
                f"{prefix}conv.conv.weight": (hidden, 1, taps),
                f"{prefix}conv.out_proj.weight": (hidden, hidden),
            }
            if reader.read_flag("conv_bias", default=False):
                tensors |= {
                    f"{prefix}conv.in_proj.bias": (3 * hidden,),
                    f"{prefix}conv.conv.bias": (hidden,),
                    f"{prefix}conv.out_proj.bias": (hidden,),
                }
        else:
            tensors |= {
                f"{prefix}self_attn.q_proj.weight": (heads * head_size, hidden),
                f"{prefix}self_attn.k_proj.weight": (key_value_heads * head_size, hidden),
                f"{prefix}self_attn.v_proj.weight": (key_value_heads * head_size, hidden),
                f"{prefix}self_attn.out_proj.weight": (hidden, heads * head_size),
                f"{prefix}self_attn.q_layernorm.weight": (head_size,),
                f"{prefix}self_attn.k_layernorm.weight": (head_size,),
            }
    if not reader.read_flag("tie_word_embeddings", default=True):
        tensors["lm_head.weight"] = (vocabulary, hidden)
    return tensors
