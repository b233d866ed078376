"""Which weights a decoder of the Llama pattern must have.

Owns the names and shapes that a shape demands and the bounds beyond which no honest checkpoint lies. Which
families exist and what their config fields mean belongs to `workers.convert.architectures`. Pure; called by
`workers.fetch.checkpoint`.

Source: the parameter names of `transformers.models.llama` and `.mistral`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from service.errors import CheckpointInvalid
from workers.convert.architectures import DecoderShape

#: The stored output layer, absent where embeddings are tied.
OUTPUT_LAYER = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

#: Buffers that old writers stored beside the weights; every loader computes them anew.
IGNORED_TENSOR = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

#: Upper bounds of config fields; what exceeds them is a mistake or an attack on the worker's memory.
BOUNDS: dict[str, int] = {
    "layers": 256,
    "hidden_size": 2**16,
    "intermediate_size": 2**19,
    "heads": 1024,
    "head_size": 2**12,
    "vocabulary_size": 2**20,
    "context_length": 2**24,
}


def require_bounds(shape: DecoderShape) -> None:
    """Raise `CheckpointInvalid` for a size beyond its bound."""
    for field, bound in BOUNDS.items():
        value = getattr(shape, field)
        if value > bound:
            raise CheckpointInvalid(
                f"config.json: {field.replace('_', ' ')} is {str(value)[:50]}; at most {bound} is taken.",
                file="config.json",
                field=field,
            )


def list_tensors(shape: DecoderShape) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every weight that the shape demands; tied embeddings leave out the output layer."""
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.heads * shape.head_size, shape.key_value_heads * shape.head_size
    attention = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    feed_forward = {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocabulary_size, hidden)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        _add_linear(tensors, prefix + "self_attn.", attention, shape.attention_bias)
        _add_linear(tensors, prefix + "mlp.", feed_forward, shape.feed_forward_bias)
        tensors[prefix + "input_layernorm.weight"] = (hidden,)
        tensors[prefix + "post_attention_layernorm.weight"] = (hidden,)
    tensors["model.norm.weight"] = (hidden,)
    if not shape.tied_embeddings:
        tensors[OUTPUT_LAYER] = (shape.vocabulary_size, hidden)
    return tensors


def _add_linear(
    tensors: dict[str, tuple[int, ...]], prefix: str, shapes: Mapping[str, tuple[int, int]], has_bias: bool
) -> None:
    for name, shape in shapes.items():
        tensors[f"{prefix}{name}.weight"] = shape
        if has_bias:
            tensors[f"{prefix}{name}.bias"] = shape[:1]
