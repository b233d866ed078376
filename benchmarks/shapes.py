"""Checkpoints of real models' shapes with random weights, written on the spot.

Owns the shapes and the lengths that they are converted with. Equal names and seeds give equal bytes. Used by scripts
of this folder.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOS_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN = "<s>", "</s>", "<unk>"
SPECIAL_TOKENS = (UNKNOWN_TOKEN, BOS_TOKEN, EOS_TOKEN)
_BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class Shape:
    """A Llama of given sizes, and the lengths that it is converted with, in tokens."""

    config: dict[str, Any]
    prefill_length: int = 128
    context_length: int = 1280


def _describe(vocabulary: int, hidden: int, feed_forward: int, layers: int, heads: int, groups: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }


#: Sizes from the models' config.json on huggingface.co.
SHAPES: dict[str, Shape] = {
    # HuggingFaceTB/SmolLM-135M
    "smollm135m": Shape({**_describe(49152, 576, 1536, 30, 9, 3), "tie_word_embeddings": True}),
    # HuggingFaceTB/SmolLM-360M
    "smollm360m": Shape({**_describe(49152, 960, 2560, 32, 15, 5), "tie_word_embeddings": True}),
    # TinyLlama/TinyLlama-1.1B-Chat-v1.0
    "tinyllama1b": Shape({**_describe(32000, 2048, 5632, 22, 32, 4), "tie_word_embeddings": False}),
}


def write_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write config, bfloat16 weights and a tokenizer of the whole vocabulary; return the folder.

    Norms are not ones, which a converter would fold away. Tokens of single bytes are unlikely, because texts of random
    bytes cannot be printed.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    identifiers = {"bos_token_id": SPECIAL_TOKENS.index(BOS_TOKEN), "eos_token_id": SPECIAL_TOKENS.index(EOS_TOKEN)}
    config = LlamaConfig(**shape.config, **identifiers, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    bytes_begin, bytes_end = len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + len(_BYTE_TOKENS)
    is_tied = bool(shape.config["tie_word_embeddings"])
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape)
        if parameter.ndim == 1:
            values.uniform_(0.5, 1.5, generator=generator)
        else:
            values.normal_(0.0, _find_scale(name, parameter.shape, shape.config), generator=generator)
        if name.startswith("model.embed_tokens" if is_tied else "lm_head"):
            values[bytes_begin:bytes_end] *= 0.05
        tensors[name] = values.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _write_tokenizer(folder, shape.config["vocab_size"])
    return folder


def _find_scale(name: str, extents: Sequence[int], config: dict[str, Any]) -> float:
    """Return the standard deviation of a matrix [outputs, inputs].

    What a layer adds shrinks with their number, as in GPT-2's initialisation: deep random networks without it multiply
    every rounding error, which trained ones do not. The output layer is sure of some tokens, as trained ones are.
    """
    if name.startswith("model.embed_tokens") and not config["tie_word_embeddings"]:
        return 1.0
    if name.startswith(("model.embed_tokens", "lm_head")):
        return float(4.0 / extents[1] ** 0.5)
    depth = 2 * config["num_hidden_layers"] if "o_proj" in name or "down_proj" in name else 1
    return float((extents[1] * depth) ** -0.5)


def _write_tokenizer(folder: Path, vocabulary_size: int) -> None:
    """Write a byte-pair tokenizer with byte fallback as Llama 2 has it, trained on words of random syllables."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE(unk_token=UNKNOWN_TOKEN, byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=0,
        special_tokens=[*SPECIAL_TOKENS, *_BYTE_TOKENS],
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    trained.train_from_iterator(_write_lines(), trainer)
    document = json.loads(trained.to_str())["model"]
    if len(document["vocab"]) != vocabulary_size:
        raise ValueError(f"The words yield {len(document['vocab'])} tokens, not {vocabulary_size}.")
    merges = [tuple(pair) for pair in document["merges"]]
    # Merged within words, but applied without splitting into them, as Llama 2 stores it.
    backend = Tokenizer(
        models.BPE(document["vocab"], merges, unk_token=UNKNOWN_TOKEN, byte_fallback=True, fuse_unk=True)
    )
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, SPECIAL_TOKENS.index(BOS_TOKEN))]
    )
    names = {"unk_token": UNKNOWN_TOKEN, "bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    tokenizer.save_pretrained(folder)


def _write_lines() -> Iterator[str]:
    """Yield lines of random words, enough for the largest vocabulary of `SHAPES`."""
    choose = random.Random(0)
    onsets = ("b", "c", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "st", "tr", "ch", "qu")
    rhymes = ("a", "e", "i", "o", "u", "an", "er", "in", "on", "us", "al", "ed", "ing", "ent", "y")
    for _ in range(8_000):
        words = (
            "".join(choose.choice(onsets) + choose.choice(rhymes) for _ in range(choose.randint(1, 4)))
            for _ in range(12)
        )
        yield " ".join(words)
