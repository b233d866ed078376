"""The decoder that the engine `reauthored` builds: one torch module for every family.

Owns what is computed, from litert-torch's norms, attention and cache updates, as a `DecoderShape` says. Loads no
weights and exports nothing. Called by `workers.convert.reauthored`.

The one mask that LiteRT-LM feeds is causal; layers with a window narrow it here, by the positions that it feeds too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from service.errors import ArchitectureUnsupported
from workers.convert import toolfixes
from workers.convert.architectures import DecoderShape, Rope
from workers.convert.architectures.shape import LayerSizes

with toolfixes.schema_without_tensorflow():
    from litert_torch.generative.layers import kv_cache, normalization, rotary_position_embedding
    from litert_torch.generative.layers import model_config as generative
    from litert_torch.generative.layers import scaled_dot_product_attention as scaled_attention

#: Added to scores that a window excludes; finite, as rows of padding may be masked everywhere.
_EXCLUDED = -0.7 * torch.finfo(torch.float32).max

#: Cosine and sine: float32 [1, tokens, channels / 2] each.
Rotation = tuple[torch.Tensor, torch.Tensor]


class Decoder(nn.Module):
    """A decoder-only transformer with the interface that litert-torch exports."""

    def __init__(self, shape: DecoderShape, context_length: int) -> None:
        super().__init__()
        self.shape = shape
        #: Read by litert-torch, for the shapes of the caches.
        self.config = build_config(shape, context_length)
        self.tok_embedding = nn.Embedding(shape.vocabulary_size, shape.hidden_size)
        if shape.names.positions is not None:
            self.positions = nn.Embedding(shape.context_length, shape.hidden_size)
        self.transformer_blocks = nn.ModuleList(Block(shape, layer) for layer in range(shape.layers))
        self.final_norm = build_norm(shape, shape.hidden_size)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocabulary_size, bias=shape.output_bias)
        self.distance_bias: torch.Tensor | None = None

    def finish(self) -> None:
        """Tie what is tied and compute what is no weight; call it once the parameters have memory."""
        if self.shape.tied_embeddings:
            self.lm_head.weight = self.tok_embedding.weight
        if self.shape.has_alibi:
            self.distance_bias = compute_distance_bias(self.shape, self.config.max_seq_len)

    @torch.inference_mode()
    def forward(
        self,
        tokens: torch.Tensor,
        input_pos: torch.Tensor,
        kv_cache: kv_cache.KVCache,
        mask: torch.Tensor,
        export_config: Any = None,
    ) -> dict[str, Any]:
        """Return the updated caches and, of all but an exported prefill, `logits`: float32 [1, tokens, vocabulary].

        `tokens`: int32 [1, tokens]. `input_pos`: int32 [tokens]. `mask`: float32 [1, 1, tokens, context], added to
        the scores.
        """
        hidden = self.tok_embedding(tokens)
        if self.shape.embedding_scale is not None:
            hidden = hidden * self.shape.embedding_scale
        if self.shape.names.positions is not None:
            # LiteRT-LM 0.18.1 scores a text from position -1 on; a lookup there would end the run.
            hidden = hidden + self.positions(input_pos.clamp(min=0))
        rotations = self._compute_rotations(input_pos)
        masks = self._compute_masks(mask, input_pos)
        entries = []
        for layer, (block, entry) in enumerate(zip(self.transformer_blocks, kv_cache.caches, strict=True)):
            rope, window = self.shape.find_rope(layer), self.shape.find_window(layer)
            hidden, updated = block(hidden, rotations[rope], masks[window], input_pos, entry)
            entries.append(updated)
        outputs: dict[str, Any] = {"kv_cache": type(kv_cache)(tuple(entries))}
        if export_config is not None and input_pos.numel() > 1 and not export_config.output_logits_on_prefill:
            return outputs
        logits = self.lm_head(self.final_norm(hidden))
        softcap = self.shape.output_softcap
        outputs["logits"] = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        return outputs

    def _compute_rotations(self, positions: torch.Tensor) -> dict[Rope | None, Rotation | None]:
        channels = self.shape.rotary_channels or self.shape.head_size
        rotations: dict[Rope | None, Rotation | None] = {None: None}
        for layer in range(self.shape.layers):
            rope = self.shape.find_rope(layer)
            if rope is not None and rope not in rotations:
                angles = positions.to(torch.float32)[None, :, None] * compute_frequencies(rope, channels)
                rotations[rope] = torch.cos(angles) * rope.amplitude, torch.sin(angles) * rope.amplitude
        return rotations

    def _compute_masks(self, mask: torch.Tensor, positions: torch.Tensor) -> dict[int | None, torch.Tensor]:
        """Return the mask of each window, narrowed to keys that are less than the window behind."""
        full = mask if self.distance_bias is None else mask + self.distance_bias
        masks: dict[int | None, torch.Tensor] = {None: full}
        keys = torch.arange(mask.shape[-1], dtype=torch.int32)[None, None, None, :]
        for window in sorted({each for each in self.shape.windows if each is not None}):
            # Within the context a window of its size excludes nothing.
            if window >= mask.shape[-1]:
                masks[window] = mask
                continue
            is_near = keys > positions.to(torch.int32)[None, None, :, None] - window
            masks[window] = torch.minimum(mask, torch.where(is_near, 0.0, _EXCLUDED))
        return masks


class Block(nn.Module):
    """One layer: attention and feed-forward, one after the other or side by side."""

    def __init__(self, shape: DecoderShape, layer: int) -> None:
        super().__init__()
        names, hidden = shape.names, shape.hidden_size
        sizes = shape.find_sizes(layer)
        self.is_parallel = shape.is_parallel
        self.attention_norm = build_norm(shape, hidden)
        self.attention = Attention(shape, sizes)
        self.feed_forward = FeedForward(shape, sizes)
        self.attention_output_norm = build_norm(shape, hidden) if names.attention_output_norm else nn.Identity()
        self.feed_forward_norm = build_norm(shape, hidden) if names.feed_forward_norm else None
        self.feed_forward_output_norm = build_norm(shape, hidden) if names.feed_forward_output_norm else nn.Identity()

    def forward(
        self,
        hidden: torch.Tensor,
        rotation: Rotation | None,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: kv_cache.KVCacheEntry,
    ) -> tuple[torch.Tensor, kv_cache.KVCacheEntry]:
        """Return the layer's output, float32 [1, tokens, hidden], and its updated cache."""
        normed = self.attention_norm(hidden)
        attended, cache = self.attention(normed, rotation, mask, positions, cache)
        attended = self.attention_output_norm(attended)
        if self.is_parallel:
            # Without a norm of its own the feed-forward reads what attention read.
            inputs = normed if self.feed_forward_norm is None else self.feed_forward_norm(hidden)
            return hidden + attended + self.feed_forward_output_norm(self.feed_forward(inputs)), cache
        hidden = hidden + attended
        inputs = hidden if self.feed_forward_norm is None else self.feed_forward_norm(hidden)
        return hidden + self.feed_forward_output_norm(self.feed_forward(inputs)), cache


class Attention(nn.Module):
    """Causal attention over a transposed cache; queries, keys and values come out of one projection."""

    def __init__(self, shape: DecoderShape, sizes: LayerSizes) -> None:
        super().__init__()
        self.heads, self.groups, self.head_size = sizes.heads, sizes.key_value_heads, shape.head_size
        self.scale = shape.attention_scale or 1.0 / math.sqrt(shape.head_size)
        self.softcap = shape.attention_softcap
        rows = (self.heads + 2 * self.groups) * self.head_size
        self.inputs = nn.Linear(shape.hidden_size, rows, bias=shape.attention_bias)
        self.output = nn.Linear(self.heads * self.head_size, shape.hidden_size, bias=shape.attention_output_bias)
        self.query_norm = build_norm(shape, shape.head_size) if shape.names.query_norm else nn.Identity()
        self.key_norm = build_norm(shape, shape.head_size) if shape.names.key_norm else nn.Identity()

    def forward(
        self,
        hidden: torch.Tensor,
        rotation: Rotation | None,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: kv_cache.KVCacheEntry,
    ) -> tuple[torch.Tensor, kv_cache.KVCacheEntry]:
        """Return what is attended to, float32 [1, tokens, hidden], and the updated cache."""
        tokens = hidden.shape[1]
        fused = self.inputs(hidden).view(1, tokens, self.heads + 2 * self.groups, self.head_size)
        queries, keys, values = fused.split((self.heads, self.groups, self.groups), dim=2)
        queries, keys = self.query_norm(queries), self.key_norm(keys)
        if rotation is not None:
            queries, keys = rotary_position_embedding.apply_rope_inline(queries, keys, *rotation)
        per_group = self.heads // self.groups
        queries = queries.permute(0, 2, 1, 3).reshape(1, self.groups, per_group * tokens, self.head_size)
        cache = kv_cache.update_transposed(cache, positions, keys.permute(0, 2, 1, 3), values.permute(0, 2, 3, 1))
        attended = scaled_attention.scaled_dot_product_attention_transposed(
            queries, cache.k_cache, cache.v_cache, self.head_size, mask=mask, scale=self.scale, softcap=self.softcap
        )
        attended = attended.reshape(1, self.heads, tokens, self.head_size).permute(0, 2, 1, 3)
        return self.output(attended.reshape(1, tokens, self.heads * self.head_size)), cache


class FeedForward(nn.Module):
    """One hidden layer, gated or not; a gate that is stored with its partner stays with it."""

    def __init__(self, shape: DecoderShape, sizes: LayerSizes) -> None:
        super().__init__()
        size, bias = sizes.intermediate_size, shape.feed_forward_bias
        self.is_gated = shape.is_gated
        self.is_fused = shape.is_gated and len(shape.names.feed_forward_inputs) == 1
        self.activation = shape.activation
        self.gate = nn.Linear(shape.hidden_size, 2 * size if self.is_fused else size, bias=bias)
        if self.is_gated and not self.is_fused:
            self.up = nn.Linear(shape.hidden_size, size, bias=bias)
        self.output = nn.Linear(size, shape.hidden_size, bias=bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 [1, tokens, hidden]."""
        gate = self.gate(hidden)
        if self.is_fused:
            gate, up = gate.chunk(2, dim=-1)
        elif self.is_gated:
            up = self.up(hidden)
        activated = activate(self.activation, gate)
        projected: torch.Tensor = self.output(activated * up if self.is_gated else activated)
        return projected


def activate(name: str, values: torch.Tensor) -> torch.Tensor:
    """Return the named function of each value."""
    if name == "silu":
        return nn.functional.silu(values)
    return nn.functional.gelu(values, approximate="tanh" if name == "gelu_tanh" else "none")


def build_norm(shape: DecoderShape, size: int) -> nn.Module:
    """Return a norm over the last axis."""
    if shape.norm == "layer":
        return nn.LayerNorm(size, eps=shape.norm_epsilon)
    norm: nn.Module = normalization.RMSNorm(
        size, eps=shape.norm_epsilon, zero_centered_gamma=shape.norm_offset == 1.0, enable_hlfb=True
    )
    return norm


def build_config(shape: DecoderShape, context_length: int) -> generative.ModelConfig:
    """Return what litert-torch needs to know of the model: the caches' sizes. The rest is in `shape`."""
    activation = generative.ActivationConfig(generative.ActivationType.LINEAR)
    blocks = []
    for sizes in map(shape.find_sizes, range(shape.layers)):
        attention = generative.AttentionConfig(
            num_heads=sizes.heads, head_dim=shape.head_size, num_query_groups=sizes.key_value_heads
        )
        feed_forward = generative.FeedForwardConfig(
            generative.FeedForwardType.SEQUENTIAL, activation, sizes.intermediate_size
        )
        blocks.append(generative.TransformerBlockConfig(attention, feed_forward))
    return generative.ModelConfig(
        vocab_size=shape.vocabulary_size,
        num_layers=shape.layers,
        max_seq_len=context_length,
        embedding_dim=shape.hidden_size,
        block_configs=blocks,
        lm_head_share_weight_with_embedding=shape.tied_embeddings,
    )


def compute_frequencies(rope: Rope, channels: int) -> torch.Tensor:
    """Return the angle per token of each channel pair: float32 [channels / 2].

    Source: transformers, `modeling_rope_utils.py`, functions for "default", "linear", "llama3" and "longrope".
    """
    exponents = torch.arange(0, channels, 2, dtype=torch.int64).to(torch.float32) / channels
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _scale_llama3(rope, frequencies)
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.wavelength_factors) * rope.theta**exponents)
    if rope.kind == "default":
        return frequencies
    raise ArchitectureUnsupported(f"The engine 'reauthored' has no rope of kind {rope.kind!r}.", kind=rope.kind)


def _scale_llama3(rope: Rope, frequencies: torch.Tensor) -> torch.Tensor:
    """Slow down long wavelengths by `factor`, keep short ones, blend between."""
    wavelengths = 2 * math.pi / frequencies
    longest = rope.original_context_length / rope.low_frequency_factor
    shortest = rope.original_context_length / rope.high_frequency_factor
    blend = (rope.original_context_length / wavelengths - rope.low_frequency_factor) / (
        rope.high_frequency_factor - rope.low_frequency_factor
    )
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    scaled = torch.where(wavelengths > longest, frequencies / rope.factor, frequencies)
    is_between = (wavelengths <= longest) & (wavelengths >= shortest)
    return torch.where(is_between, blended, scaled)


def compute_distance_bias(shape: DecoderShape, context_length: int) -> torch.Tensor:
    """Return what ALiBi adds to scaled scores: float32 [groups, heads per group, 1, context].

    The sum over a row's keys is what counts, so that the key's position stands for its distance. Slopes and products
    are rounded to bfloat16, as in the source: transformers, `modeling_falcon.py`, `build_alibi_tensor`.
    """
    whole = 2 ** math.floor(math.log2(shape.heads))
    slopes = [2.0 ** (-8.0 * (index + 1) / whole) for index in range(whole)]
    slopes += [2.0 ** (-8.0 * (2 * index + 1) / (2 * whole)) for index in range(shape.heads - whole)]
    biases = torch.tensor(slopes).bfloat16()[:, None] * torch.arange(context_length)
    scaled: torch.Tensor = biases.to(torch.float32) / math.sqrt(shape.head_size)
    return scaled.reshape(shape.key_value_heads, -1, 1, context_length)
