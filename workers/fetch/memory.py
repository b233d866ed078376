"""How much memory each step of a job will need, from the checkpoint's headers alone. Pure.

Owns the model of what is held at a step's peak: which copies of the weights, of the KV caches and of rows of logits.
Its few constants are measured (`docs/memory.md` has the measurements and the error); nothing is fitted per model.
Figures are `peak_anon_bytes`: anonymous and shared memory, which limits apply to, without files that are mapped.
Called by `workers.fetch.plan`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from workers.convert.architectures import DecoderShape

_MIB = 1 << 20
_FLOAT_BYTES = 4

#: A child of the pool `convert` (torch, litert-torch, transformers imported), and one of the pool `light`, idle.
_CONVERT_BASE_BYTES = 400 * _MIB
_LIGHT_BASE_BYTES = 65 * _MIB
#: Graph, decompositions and MLIR of one layer in one signature, while they are traced and lowered.
_TRACED_LAYER_BYTES = 5 * _MIB
#: What tracing and lowering need whatever the model.
_LOWERING_BYTES = 60 * _MIB
#: From here on a graph's weights stand behind the flatbuffer and are written one after another.
_STREAMED_BYTES = 2**31
#: A tokenizer's token, as JSON, in sentencepiece's protobuf and in the libraries that read them.
_TOKEN_BYTES = 1024
#: Bits of a weight, as recipes are named.
_BITS = re.compile(r"(?:int|float)(\d+)")
#: Logits that are kept: the probe's compared positions.
_PROBE_ROWS = 85


@dataclass(frozen=True)
class Load:
    """What a step of this checkpoint may hold copies of; all in bytes, as float32."""

    #: Every parameter of the graph; tied embeddings once.
    weights: int
    #: The input embedding, which is looked up and not multiplied, unless it is the output layer too.
    embedding: int
    #: The output layer, which `decode` alone has.
    output: int
    #: Keys and values of the whole context.
    caches: int
    #: One row of logits for each compared position.
    rows: int
    layers: int
    #: Number of prefill signatures; `decode` comes on top.
    prefills: int


def predict_peaks(
    shape: DecoderShape,
    parameters: int,
    *,
    engines: Sequence[str],
    recipes: Sequence[str],
    formats: Sequence[str],
    prefill_lengths: Sequence[int],
    context_length: int,
) -> dict[str, int]:
    """Return predicted `peak_anon_bytes` by step kind, or by kind and what its size depends on.

    Names are `reference`, `bundle`, `convert:ENGINE`, `quantize:RECIPE` and `verify:RECIPE:FORMAT`. `engines` are
    resolved; a recipe of unknown bits counts as float32, which is the most.
    """
    load = _describe_load(shape, parameters, len(prefill_lengths), context_length)
    peaks = {"reference": _predict_reference(load), "bundle": _predict_bundle(shape.vocabulary_size)}
    peaks |= {f"convert:{engine}": _predict_convert(load, engine) for engine in engines}
    for recipe in recipes:
        peaks[f"quantize:{recipe}"] = _predict_quantize(load, recipe)
        for kind in ("tflite", *formats):
            peaks[f"verify:{recipe}:{kind}"] = _predict_verify(load, recipe, kind)
    return {name: int(size_bytes) for name, size_bytes in peaks.items()}


def _describe_load(shape: DecoderShape, parameters: int, prefills: int, context_length: int) -> Load:
    matrix = shape.vocabulary_size * shape.hidden_size * _FLOAT_BYTES
    per_token = 2 * shape.layers * shape.key_value_heads * shape.head_size * _FLOAT_BYTES
    return Load(
        weights=parameters * _FLOAT_BYTES,
        embedding=0 if shape.tied_embeddings else matrix,
        output=matrix,
        caches=per_token * context_length,
        rows=_PROBE_ROWS * shape.vocabulary_size * _FLOAT_BYTES,
        layers=shape.layers,
        prefills=prefills,
    )


def _predict_reference(load: Load) -> float:
    """The source in float32, the cache of the long text twice while it grows, and logits before and after joining."""
    return _CONVERT_BASE_BYTES + load.weights + 2 * load.caches + 4 * load.rows


def _predict_convert(load: Load, engine: str) -> float:
    """Traced layers of each signature, and copies of the weights.

    `reauthored` maps its weights: it holds one tensor while that is widened (as stored, as float32, as checked), and
    up to 2 GiB the file and its buffers. `traced` holds the model, the MLIR context's copy, what its passes make, and
    up to 2 GiB the file.
    """
    is_streamed = load.weights >= _STREAMED_BYTES
    traced = _LOWERING_BYTES + _TRACED_LAYER_BYTES * load.layers * (load.prefills + 1)
    if engine == "reauthored":
        held = max(3 * load.output - traced, 0 if is_streamed else 2 * load.weights)
    else:
        held = load.weights * (3 if is_streamed else 4)
    return _CONVERT_BASE_BYTES + traced + held


def _predict_quantize(load: Load, recipe: str) -> float:
    """What was quantized so far, and a large matrix in work; float model and result are mapped.

    Casting to float16 keeps one more copy. Calibration runs the float graph before.
    """
    if recipe == "none":
        return _LIGHT_BASE_BYTES
    copies = 2 if recipe == "float16" else 1
    held = _LIGHT_BASE_BYTES + copies * load.weights * _share(recipe) + 1.2 * load.output
    return max(held, _predict_verify(load, "none", "tflite")) if recipe.startswith("static") else held


def _predict_bundle(vocabulary_size: int) -> float:
    """The tokenizer, read and written; the graph is copied piece by piece."""
    return _LIGHT_BASE_BYTES + _TOKEN_BYTES * vocabulary_size


def _predict_verify(load: Load, recipe: str, kind: str) -> float:
    """Weights as the delegate packs them, for each signature; caches as the graph takes and gives them; logits.

    A bundle is asked in the runtime, which has its caches inside.
    """
    packed = _count_packed(load, recipe)
    if kind == "tflite":
        return _LIGHT_BASE_BYTES + packed + 6 * load.caches + 12 * load.rows
    return _LIGHT_BASE_BYTES + packed + 2 * load.caches + 2 * load.rows


def _count_packed(load: Load, recipe: str) -> float:
    """Return what XNNPACK copies of the weights, in bytes: per signature, the output layer in `decode` alone.

    Integer matrix products are packed as integers. Weights that are only stored in fewer bits are packed as float32,
    and widened before that, embeddings too; those in float16 are kept once as they are.
    """
    inner = load.weights - load.embedding - load.output
    multiplied = load.prefills * inner + inner + load.output
    if recipe.startswith("weight_only"):
        return 2 * multiplied + (load.prefills + 1) * load.embedding
    if recipe == "float16":
        return multiplied + load.weights / 2
    return multiplied * _share(recipe)


def _share(recipe: str) -> float:
    """Return the size of quantized weights as a share of float32; recipes of unknown bits count as float32."""
    if recipe.startswith("static"):
        # The name's bits are the activations'.
        return 8 / 32
    bits = _BITS.search(recipe)
    return int(bits[1]) / 32 if bits else 1.0
