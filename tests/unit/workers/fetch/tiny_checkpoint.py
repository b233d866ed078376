"""A tiny Llama checkpoint written with numpy and json alone, made to be spoilt.

Owns the files of one valid checkpoint and the writing of safetensors files whose header may say anything. Called
by the tests of this folder.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, LAYERS, VOCABULARY, CONTEXT = 8, 16, 2, 1, 2, 12, 64

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "_name_or_path": "/somewhere/harmless",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [{"id": 1, "content": "<s>", "special": True}, {"id": 2, "content": "</s>", "special": True}],
    "model": {"type": "BPE", "vocab": {f"t{index}": index for index in range(VOCABULARY)}, "merges": []},
}

TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"content": "</s>"},
    "chat_template": "{% for message in messages %}{{ bos_token + message['content'] + eos_token }}{% endfor %}",
}

Tensors = dict[str, np.ndarray[Any, Any]]


def build_tensors(seed: int = 0) -> Tensors:
    """Return the weights that CONFIG demands as float32."""
    generator = np.random.default_rng(seed)
    head = HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "post_attention_layernorm.weight": (HIDDEN,),
            prefix + "self_attn.q_proj.weight": (HEADS * head, HIDDEN),
            prefix + "self_attn.k_proj.weight": (KEY_VALUE_HEADS * head, HIDDEN),
            prefix + "self_attn.v_proj.weight": (KEY_VALUE_HEADS * head, HIDDEN),
            prefix + "self_attn.o_proj.weight": (HIDDEN, HEADS * head),
            prefix + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            prefix + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            prefix + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def encode(values: np.ndarray[Any, Any], dtype: str) -> bytes:
    """Return float32 values as the bytes of a safetensors dtype."""
    if dtype == "F32":
        return values.astype("<f4").tobytes()
    if dtype == "F16":
        return values.astype("<f2").tobytes()
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """Write a safetensors file with this header (an object, or the very bytes) and these data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray[Any, Any]], dtype: str = "BF16") -> Path:
    """Write a well-formed safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        encoded = encode(values, dtype)
        offsets = [len(data), len(data) + len(encoded)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        data += encoded
    return write_raw(path, header, data)


def write_json(path: Path, document: Any) -> Path:
    """Write a JSON file."""
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def write_tiny(folder: Path, tensors: Tensors | None = None, dtype: str = "BF16", **config: Any) -> Path:
    """Write the valid checkpoint; `config` overrides fields of config.json (None removes one)."""
    folder.mkdir(parents=True, exist_ok=True)
    stated = {name: value for name, value in {**CONFIG, **config}.items() if value is not None}
    write_json(folder / "config.json", stated)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": None})
    write_json(folder / "tokenizer.json", TOKENIZER)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    write_tensors(folder / "model.safetensors", build_tensors() if tensors is None else tensors, dtype)
    return folder


def write_sharded(folder: Path) -> Path:
    """Write the valid checkpoint in two shards with an index."""
    write_tiny(folder)
    (folder / "model.safetensors").unlink()
    tensors = build_tensors()
    names = list(tensors)
    halves = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for shard, held in halves.items():
        write_tensors(folder / shard, {name: tensors[name] for name in held})
    weight_map = {name: shard for shard, held in halves.items() for name in held}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def ignore_progress(message: str, fraction: float | None = None) -> None:
    """Take progress and drop it."""
