"""A checkpoint of chosen random weights, written from a `config.json` alone: what templates are made of.

Owns which tensors such a checkpoint has and what stands in them. The values hold nothing of anybody's model, differ
from each other, and none of them is one that a converter would fold away. Called by `workers.convert.template`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from workers.convert import architectures
from workers.convert.architectures import DecoderShape
from workers.convert.architectures.parameters import list_parameters

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

#: The engine `traced` opens a tokenizer too; no graph depends on it.
_TOKENIZER = {
    "tokenizer.json": {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"},
    },
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"},
}

_FLOAT_BYTES = 4
#: What is made and written at a time.
_BLOCK_VALUES = 1 << 22
#: Sign, all of the mantissa and the lowest bit of the exponent are random, on top of 0.5: magnitudes from 0.5 to 2.
_RANDOM_BITS = np.uint32(0x80FFFFFF)
_FIXED_BITS = np.uint32(0x3F000000)


def write_checkpoint(config: Mapping[str, Any], folder: Path, seed: int) -> Path:
    """Write `config.json`, float32 weights and a tokenizer of one word into the new `folder`; return it.

    Memory is bounded, and equal arguments give equal bytes. Raises `ArchitectureUnsupported` and `CheckpointInvalid`
    for the config.
    """
    tensors = list_tensors(config)
    folder.mkdir(parents=True)
    for name, document in {CONFIG_FILE: config, **_TOKENIZER}.items():
        (folder / name).write_text(json.dumps(document, indent=2), encoding="utf-8")
    generator = np.random.Generator(np.random.PCG64(seed))
    with (folder / WEIGHTS_FILE).open("wb") as stream:
        stream.write(_write_header(tensors))
        for extents in tensors.values():
            for block in _draw(generator, math.prod(extents)):
                stream.write(block)
    return folder


def list_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name and extents of every tensor that a checkpoint of this config holds, tied ones once."""
    family = architectures.find_family(config)
    shape = family.read_shape(config)
    if shape.has_open_weights:
        return _ask_transformers(config, shape)
    if shape.tensors:
        return dict(shape.tensors)
    return {name: extents for parameter in list_parameters(shape) for name, extents in parameter.tensors}


def _ask_transformers(config: Mapping[str, Any], shape: DecoderShape) -> dict[str, tuple[int, ...]]:
    """Let transformers build the model without memory, for a family whose layers nobody has described here."""
    # Not at the top: light modules read this file too.
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
    left_out = {f"{shape.names.output}.weight"} if shape.tied_embeddings else set()
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in left_out}


def _write_header(tensors: Mapping[str, tuple[int, ...]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, extents in tensors.items():
        size_bytes = math.prod(extents) * _FLOAT_BYTES
        header[name] = {"dtype": "F32", "shape": list(extents), "data_offsets": [position, position + size_bytes]}
        position += size_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _draw(generator: np.random.Generator, values: int) -> Iterator[bytes]:
    while values:
        count = min(values, _BLOCK_VALUES)
        bits = np.frombuffer(generator.bytes(count * _FLOAT_BYTES), dtype=np.uint32)
        yield ((bits & _RANDOM_BITS) | _FIXED_BITS).tobytes()
        values -= count
