"""What the engines need to know of a decoder-only transformer, whatever its family. Pure.

Owns the dataclasses alone; reading them from a `config.json` belongs to the family files beside it. Read by
`workers.convert.reauthored`, `workers.fetch` and `parameters`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: how fast each pair of channels turns."""

    #: Base of the geometric series of wavelengths.
    theta: float
    #: `default`: as in the paper. `linear`: positions divided by `factor`. `llama3`: long wavelengths only.
    #: `longrope`: each wavelength multiplied by its own factor.
    kind: Literal["default", "linear", "llama3", "longrope"] = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    #: Context length before the scaling, in tokens.
    original_context_length: int = 0
    #: `longrope`: what each wavelength is multiplied with, one per pair of channels.
    wavelength_factors: tuple[float, ...] = ()
    #: Cosine and sine are multiplied with it.
    amplitude: float = 1.0


@dataclass(frozen=True)
class LayerSizes:
    """What may differ from layer to layer."""

    heads: int
    key_value_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class TensorNames:
    """How a family names its tensors, without `.weight` and `.bias`; None where it has no such tensor.

    The defaults are those of `transformers.models.llama`.
    """

    #: What the names of everything but the output layer begin with; checkpoints of the bare model leave it out.
    prefix: str = "model."
    #: What the names of one layer begin with, after the prefix; `{}` is its number.
    layer: str = "layers.{}."
    embedding: str = "embed_tokens"
    #: Learned positions.
    positions: str | None = None
    final_norm: str = "norm"
    #: The output layer; without prefix.
    output: str = "lm_head"
    attention_norm: str = "input_layernorm"
    #: Queries, keys and values, in this order, as three tensors or one.
    attention_inputs: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    query_norm: str | None = None
    key_norm: str | None = None
    attention_output: str = "self_attn.o_proj"
    #: On what attention gives, before it is added.
    attention_output_norm: str | None = None
    #: None: the feed-forward reads what attention read.
    feed_forward_norm: str | None = "post_attention_layernorm"
    #: Gate and up, in this order, as two tensors or one; of an ungated feed-forward the one.
    feed_forward_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    feed_forward_output: str = "mlp.down_proj"
    feed_forward_output_norm: str | None = None


@dataclass(frozen=True)
class DecoderShape:
    """Sizes and choices of a decoder-only transformer; the defaults are Llama's choices."""

    architecture: str
    family: str
    vocabulary_size: int
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    key_value_heads: int
    head_size: int
    norm_epsilon: float
    #: None: positions are learned, or distances are punished (`has_alibi`).
    rope: Rope | None
    #: The longest context the checkpoint was made for, in tokens.
    context_length: int
    tied_embeddings: bool
    #: The sizes of each layer where they differ; `heads` and the others are then the largest. Empty: all are alike.
    layer_sizes: tuple[LayerSizes, ...] = ()
    #: Of queries, keys and values.
    attention_bias: bool = False
    attention_output_bias: bool = False
    feed_forward_bias: bool = False
    #: Of the output layer.
    output_bias: bool = False
    #: Tokens that attention looks back on and no engine limits: a longer context is refused. None: no such limit.
    attention_window: int | None = None
    #: Per layer, the tokens that attention looks back on, itself included, or None for all; empty: all in every layer.
    windows: tuple[int | None, ...] = ()
    #: The rotary positions of layers with a window, where they differ.
    local_rope: Rope | None = None
    #: Channels of a head that turn; None: all.
    rotary_channels: int | None = None
    #: Slopes over the distance, added to the scores.
    has_alibi: bool = False
    norm: Literal["rms", "layer"] = "rms"
    #: What is added to the stored weights of norms.
    norm_offset: float = 0.0
    activation: Activation = "silu"
    #: Whether the feed-forward multiplies its activation with a second projection.
    is_gated: bool = True
    #: Whether the feed-forward reads the layer's input and not what attention added to.
    is_parallel: bool = False
    #: What embeddings are multiplied with.
    embedding_scale: float | None = None
    #: What scores are multiplied with; None: one over the square root of `head_size`.
    attention_scale: float | None = None
    #: Scores and logits are squeezed between plus and minus these.
    attention_softcap: float | None = None
    output_softcap: float | None = None
    #: Whether one tensor of queries, keys and values holds them per group of heads and not one after another.
    is_grouped: bool = False
    #: Whether matrices lie as [inputs, outputs].
    is_transposed: bool = False
    names: TensorNames = field(default_factory=TensorNames)
    #: Names and shapes of all weights of a model that only `traced` converts; what its layers compute is then not
    #: described here.
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = ()
    #: Whether only transformers knows which weights there must be; `plan` takes those that are stored.
    has_open_weights: bool = False

    def find_sizes(self, layer: int) -> LayerSizes:
        """Return the sizes of a layer."""
        if self.layer_sizes:
            return self.layer_sizes[layer]
        return LayerSizes(self.heads, self.key_value_heads, self.intermediate_size)

    def find_window(self, layer: int) -> int | None:
        """Return how many tokens a layer's attention looks back on; None means all of them."""
        return self.windows[layer] if self.windows else None

    def find_rope(self, layer: int) -> Rope | None:
        """Return the rotary positions of a layer."""
        return self.local_rope if self.local_rope is not None and self.find_window(layer) is not None else self.rope
