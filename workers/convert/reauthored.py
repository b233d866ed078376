"""The engine `reauthored`: the decoder rebuilt from the Generative API's layers, then converted.

Owns the mapping from a `DecoderShape` and checkpoint tensors to litert-torch's model, and the export settings
that LiteRT-LM needs. Writes a float32 graph; never quantizes. Called by `workers.convert.convert`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from service.errors import ArchitectureUnsupported, CheckpointInvalid
from workers.convert import toolfixes
from workers.convert.architectures import DecoderShape, Rope
from workers.convert.weights import CheckpointTensors

with toolfixes.schema_without_tensorflow():
    from litert_torch.generative.layers import kv_cache
    from litert_torch.generative.layers import model_config as generative
    from litert_torch.generative.utilities import converter, model_builder
    from litert_torch.generative.utilities.export_config import ExportConfig

#: Old checkpoints store the rotary wavelengths; they follow from config.json.
_IGNORABLE_SUFFIXES = ("rotary_emb.inv_freq",)

RopeFunction = Callable[[torch.Tensor, int, float], tuple[torch.Tensor, torch.Tensor]]


def convert(
    checkpoint_dir: Path, shape: DecoderShape, prefill_lengths: list[int], context_length: int, output_dir: Path
) -> Path:
    """Write the float32 graph with one `prefill_N` signature a length and `decode`; return its path.

    The KV cache is transposed (keys [1, heads, context, head], values [1, heads, head, context]) and the mask
    is an input: with any other layout LiteRT-LM 0.18 reads a context of two tokens, and with a mask made inside
    the graph decoding was half as fast.
    """
    model = build_model(checkpoint_dir, shape, context_length)
    written = converter.convert_to_tflite(
        model,
        output_path=str(output_dir),
        output_name_prefix="model",
        prefill_seq_len=list(prefill_lengths),
        kv_cache_max_len=context_length,
        quantize="none",
        export_config=ExportConfig(kvcache_layout=kv_cache.KV_LAYOUT_TRANSPOSED, mask_as_input=True),
    )
    return Path(written)


def build_model(checkpoint_dir: Path, shape: DecoderShape, context_length: int) -> torch.nn.Module:
    """Return the re-authored float32 model with the checkpoint's weights.

    Raises `CheckpointInvalid` when weights and config disagree.
    """
    config = build_config(shape, context_length)
    # On the meta device first: no time and memory for random values that are overwritten at once.
    with torch.device("meta"):
        model = model_builder.DecoderOnlyModel(config)
    model = model.to_empty(device="cpu")
    if shape.tied_embeddings:
        model.lm_head.weight = model.tok_embedding.weight
    with CheckpointTensors(checkpoint_dir) as tensors, torch.no_grad():
        _load_weights(model, shape, tensors)
        tensors.require_all_used(_IGNORABLE_SUFFIXES)
    built: torch.nn.Module = model.eval()
    return built


def build_config(shape: DecoderShape, context_length: int) -> generative.ModelConfig:
    """Return litert-torch's description of the model; every size comes from `shape`."""
    norm = generative.NormalizationConfig(
        type=generative.NormalizationType.RMS_NORM, epsilon=shape.norm_epsilon, use_bias=False
    )
    block = generative.TransformerBlockConfig(
        attn_config=generative.AttentionConfig(
            num_heads=shape.heads,
            head_dim=shape.head_size,
            num_query_groups=shape.key_value_heads,
            rotary_base=shape.rope.theta,
            rotary_percentage=1.0,
            qkv_use_bias=shape.attention_bias,
            output_proj_use_bias=shape.attention_bias,
        ),
        ff_config=generative.FeedForwardConfig(
            type=generative.FeedForwardType.GATED,
            activation=generative.ActivationConfig(generative.ActivationType.SILU),
            intermediate_size=shape.intermediate_size,
            use_bias=shape.feed_forward_bias,
        ),
        pre_attention_norm_config=norm,
        post_attention_norm_config=norm,
    )
    return generative.ModelConfig(
        vocab_size=shape.vocabulary_size,
        num_layers=shape.layers,
        max_seq_len=context_length,
        embedding_dim=shape.hidden_size,
        block_configs=block,
        final_norm_config=norm,
        lm_head_share_weight_with_embedding=shape.tied_embeddings,
        build_rope=build_rope(shape.rope),
    )


def build_rope(rope: Rope) -> RopeFunction:
    """Return the function litert-torch calls for cosine and sine, float32 [1, tokens, channels / 2] each."""

    def compute(positions: torch.Tensor, channels: int, _base: float) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions.to(torch.float32)[None, :, None] * compute_frequencies(rope, channels)[None, None, :]
        return torch.cos(angles), torch.sin(angles)

    return compute


def compute_frequencies(rope: Rope, channels: int) -> torch.Tensor:
    """Return the angle per token of each channel pair: float32 [channels / 2].

    Source: transformers, `modeling_rope_utils.py`, functions for "default", "linear" and "llama3".
    """
    exponents = torch.arange(0, channels, 2, dtype=torch.int64).to(torch.float32) / channels
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _scale_llama3(rope, frequencies)
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


def _load_weights(model: torch.nn.Module, shape: DecoderShape, tensors: CheckpointTensors) -> None:
    """Fill every parameter of `model`, one checkpoint tensor in memory at a time."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled: set[str] = set()

    def fill(name: str, values: torch.Tensor) -> None:
        parameters[name].copy_(values)
        filled.add(name)

    def copy(name: str, source: str) -> None:
        fill(name, tensors.read(source, parameters[name].shape))

    copy("tok_embedding.weight", "model.embed_tokens.weight")
    copy("final_norm.weight", "model.norm.weight")
    if not shape.tied_embeddings:
        copy("lm_head.weight", "lm_head.weight")
    else:
        filled.add("lm_head.weight")
        _require_tied(tensors, parameters["tok_embedding.weight"])
    for layer in range(shape.layers):
        ours, theirs = f"transformer_blocks.{layer}", f"model.layers.{layer}"
        copy(f"{ours}.pre_atten_norm.weight", f"{theirs}.input_layernorm.weight")
        copy(f"{ours}.post_atten_norm.weight", f"{theirs}.post_attention_layernorm.weight")
        for kind in ("weight", "bias") if shape.attention_bias else ("weight",):
            fill(f"{ours}.atten_func.qkv_projection.{kind}", _read_fused(tensors, shape, theirs, kind))
            copy(f"{ours}.atten_func.output_projection.{kind}", f"{theirs}.self_attn.o_proj.{kind}")
        for kind in ("weight", "bias") if shape.feed_forward_bias else ("weight",):
            copy(f"{ours}.ff.w1.{kind}", f"{theirs}.mlp.gate_proj.{kind}")
            copy(f"{ours}.ff.w3.{kind}", f"{theirs}.mlp.up_proj.{kind}")
            copy(f"{ours}.ff.w2.{kind}", f"{theirs}.mlp.down_proj.{kind}")
    forgotten = set(parameters) - filled
    if forgotten:
        raise AssertionError(f"parameters without a source: {sorted(forgotten)}")


def _read_fused(tensors: CheckpointTensors, shape: DecoderShape, layer: str, kind: str) -> torch.Tensor:
    """Return the fused projection: for each key-value head its queries, its key, its value, along rows."""
    inputs = (shape.hidden_size,) if kind == "weight" else ()
    groups, per_group = shape.key_value_heads, shape.heads // shape.key_value_heads
    parts = [
        tensors.read(f"{layer}.self_attn.{name}_proj.{kind}", (groups * heads * shape.head_size, *inputs)).reshape(
            groups, heads * shape.head_size, *inputs
        )
        for name, heads in (("q", per_group), ("k", 1), ("v", 1))
    ]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _require_tied(tensors: CheckpointTensors, embedding: torch.Tensor) -> None:
    """Accept a stored output matrix beside tied embeddings only if it is the embedding."""
    name = "lm_head.weight"
    if name in tensors and not torch.equal(tensors.read(name, embedding.shape), embedding):
        raise CheckpointInvalid(
            "config.json ties the embeddings, but the weights hold another output matrix 'lm_head.weight'.",
            tensor=name,
        )
