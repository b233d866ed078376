"""The engine `reauthored`: the decoder rebuilt from the Generative API's layers, then converted.

Owns the filling of the rebuilt model from checkpoint tensors, and the export settings that LiteRT-LM needs. Writes
a float32 graph; never quantizes. Called by `workers.convert.convert`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from service.errors import CheckpointInvalid
from workers.convert import side_by_side, toolfixes
from workers.convert.architectures import DecoderShape
from workers.convert.architectures.parameters import (
    IGNORED_TENSOR,
    Parameter,
    complete_names,
    find_output,
    list_parameters,
)
from workers.convert.reauthored_layers import Decoder, compute_frequencies
from workers.convert.weights import CheckpointTensors, map_parameters

with toolfixes.schema_without_tensorflow():
    from litert_torch.generative.layers import kv_cache
    from litert_torch.generative.utilities import converter
    from litert_torch.generative.utilities.export_config import ExportConfig

__all__ = ["build_model", "compute_frequencies", "convert"]


def convert(
    checkpoint_dir: Path, shape: DecoderShape, prefill_lengths: list[int], context_length: int, output_dir: Path
) -> Path:
    """Write the float32 graph with one `prefill_N` signature a length and `decode`; return its path.

    The KV cache is transposed (keys [1, heads, context, head], values [1, heads, head, context]) and the mask
    is an input: with any other layout LiteRT-LM 0.18 reads a context of two tokens, and with a mask made inside
    the graph decoding was half as fast. No copy of the weights is held in anonymous memory.
    """
    model = build_model(checkpoint_dir, shape, context_length, output_dir / "weights")
    with side_by_side.signatures_side_by_side(), toolfixes.weights_taken_in_place():
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


def build_model(
    checkpoint_dir: Path, shape: DecoderShape, context_length: int, weights_path: Path | None = None
) -> Decoder:
    """Return the re-authored float32 model with the checkpoint's weights.

    With `weights_path` they lie in that new file, mapped, so that the kernel can page them out. Raises
    `CheckpointInvalid` when weights and config disagree.
    """
    # On the meta device first: no time and memory for random values that are overwritten at once.
    with torch.device("meta"):
        model = Decoder(shape, context_length)
    model = model.to_empty(device="cpu")
    model.finish()
    if weights_path is not None:
        map_parameters(model, weights_path)
    with CheckpointTensors(checkpoint_dir, partial(complete_names, shape)) as tensors, torch.no_grad():
        _load_weights(model, shape, tensors)
        tensors.require_all_used(IGNORED_TENSOR)
    return model.eval().requires_grad_(False)


def _load_weights(model: Decoder, shape: DecoderShape, tensors: CheckpointTensors) -> None:
    """Fill every parameter of `model`, one checkpoint tensor in memory at a time."""
    parameters = dict(model.named_parameters())
    for parameter in list_parameters(shape):
        parameters.pop(parameter.name).copy_(_read(parameter, shape, tensors))
    if parameters:
        raise AssertionError(f"parameters without a source: {sorted(parameters)}")
    if shape.tied_embeddings:
        _require_tied(tensors, find_output(shape), model.tok_embedding.weight)


def _read(parameter: Parameter, shape: DecoderShape, tensors: CheckpointTensors) -> torch.Tensor:
    """Return the rows of one parameter, as the rebuilt model orders them."""
    parts = [tensors.read(name, extents) for name, extents in parameter.tensors]
    values = parts[0] if len(parts) == 1 else torch.cat(parts)
    if parameter.is_transposed:
        values = torch.cat([part.T for part in parts])
    if parameter.is_grouped:
        per_group = shape.heads // shape.key_value_heads
        groups = values.reshape(shape.key_value_heads, per_group + 2, shape.head_size, *values.shape[1:])
        ordered = (groups[:, :per_group], groups[:, per_group], groups[:, per_group + 1])
        values = torch.cat([each.reshape(-1, *values.shape[1:]) for each in ordered])
    return values


def _require_tied(tensors: CheckpointTensors, name: str, embedding: torch.Tensor) -> None:
    """Accept a stored output matrix beside tied embeddings only if it is the embedding."""
    if name in tensors and not torch.equal(tensors.read(name, embedding.shape), embedding):
        raise CheckpointInvalid(
            f"config.json ties the embeddings, but the weights hold another output matrix {name!r}.",
            tensor=name,
        )
