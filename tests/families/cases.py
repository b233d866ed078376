"""Small checkpoints of every family, one for each choice that its config.json has.

Owns the configs alone. Called by the comparison of torch modules (`tests/convert/test_families.py`) and by the
conversions of this folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.checkpoints import BYTE_TOKENS, LLAMA3_ROPE_SCALING, TokenizerKind, WeightsDtype, write_checkpoint
from workers.convert.architectures.as_built import AS_BUILT

_THETA = {"rope_type": "default", "rope_theta": 20_000.0}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.9, 2.2, 2.8],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
    "original_max_position_embeddings": 256,
    "partial_rotary_factor": 0.75,
}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
}
_GEMMA4 = {
    "head_dim": 16, "global_head_dim": 32, "num_hidden_layers": 4, "sliding_window": 24, "tie_word_embeddings": True,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "enable_moe_block": False,
}  # fmt: skip
#: Every row is a multiple of 128, the largest block that a recipe has; heads have a size of their own.
_WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
_AUTO_MAP = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "someone/else--own.Model"}
_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_TOKENIZERS = {
    "byte_level": "byte-level BPE",
    "metaspace": "BPE",
    "sentencepiece": "SentencePiece",
    "unigram": "unigram",
}
#: GPT-2's own names of the sizes.
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "tie_word_embeddings": True}

#: What families of `as_built` have beside the sizes that all are given.
_WINDOWS = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
_AS_BUILT: dict[str, dict[str, Any]] = {
    "cohere": {"tie_word_embeddings": True},
    "cohere2": {**_WINDOWS, "head_dim": 32, "tie_word_embeddings": True},
    "cwm": {**_WINDOWS, "head_dim": 32},
    "exaone4": _WINDOWS,
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "ministral": {**_WINDOWS, "head_dim": 16},
    "olmo3": _WINDOWS,
    "vaultgemma": {**_WINDOWS, "head_dim": 16, "tie_word_embeddings": True},
}


@dataclass(frozen=True)
class Case:
    """One small checkpoint."""

    name: str
    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    dtype: WeightsDtype = "bfloat16"
    shard_size: str | None = None
    tokenizer: TokenizerKind = "byte_level"
    #: What it has that others have not, for the page of a run.
    about: str = ""
    #: Whether it names code of its own, as older repositories of the Hub do.
    has_custom_code: bool = False
    #: Whether `make test-families` converts it; all are compared as torch modules.
    is_converted: bool = True

    def write(self, folder: Path, *, has_tokenizer: bool = True) -> Path:
        """Write the checkpoint and return its folder."""
        self._write(folder, has_tokenizer)
        if self.has_custom_code:
            path = folder / "config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps({**config, "auto_map": _AUTO_MAP}), encoding="utf-8")
            (folder / "own.py").write_text("raise AssertionError('imported')", encoding="utf-8")
        return folder

    def describe(self) -> str:
        """Return what it is made of, in a few words."""
        parts = [self.about, _DTYPES[self.dtype], "sharded" if self.shard_size else "", _TOKENIZERS[self.tokenizer]]
        return ", ".join([*filter(None, parts), *(["`auto_map`"] if self.has_custom_code else [])])

    def _write(self, folder: Path, has_tokenizer: bool) -> None:
        write_checkpoint(
            folder,
            config=self.config,
            dtype=self.dtype,
            shard_size=self.shard_size,
            tokenizer=self.tokenizer if has_tokenizer else None,
            architecture=self.architecture,
            # Random bytes are no text, and the runtime's detokenizer gives up on some.
            rare_tokens=None if self.tokenizer == "byte_level" else BYTE_TOKENS,
        )


CASES: tuple[Case, ...] = (
    Case(
        "llama-3.2",
        "LlamaForCausalLM",
        {**_WIDE, "tie_word_embeddings": True, "rope_parameters": {**LLAMA3_ROPE_SCALING, "rope_theta": 5e5}},
        shard_size="50KB",
        about="tied, grouped heads of their own size, scaled rope",
    ),
    Case("llama-2", "LlamaForCausalLM", {"num_key_value_heads": 4}, "float16", tokenizer="sentencepiece",
         is_converted=False),
    Case("tinyllama", "LlamaForCausalLM", {"num_key_value_heads": 1}, tokenizer="sentencepiece", is_converted=False),
    Case("smollm", "LlamaForCausalLM", {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 72,
         "head_dim": 8, "tie_word_embeddings": True}, is_converted=False),
    Case("amd-llama", "LlamaForCausalLM", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}, tokenizer="metaspace",
         is_converted=False),
    Case("llama-biased", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}, about="biases everywhere"),
    Case("mistral", "MistralForCausalLM", {"sliding_window": 128}, tokenizer="metaspace",
         about="context within the window"),
    Case("qwen2", "Qwen2ForCausalLM", {"tie_word_embeddings": True, "rope_parameters": _THETA},
         about="tied, biased queries, keys and values"),
    Case("deepseek-r1-distill-qwen", "Qwen2ForCausalLM", {"rope_parameters": _THETA}, "float16", is_converted=False),
    Case("qwen2-window", "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 24,
         "max_window_layers": 1}, is_converted=False),
    Case("qwen3", "Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": _THETA},
         about="tied, norms of queries and keys, heads of their own size"),
    Case("qwen3-biased", "Qwen3ForCausalLM", {"head_dim": 32, "attention_bias": True}, is_converted=False),
    Case("gemma", "GemmaForCausalLM", {"head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": True},
         tokenizer="sentencepiece", about="tied, multi-query"),
    Case("gemma-biased", "GemmaForCausalLM", {"head_dim": 16, "attention_bias": True}, is_converted=False),
    Case(
        "gemma2",
        "Gemma2ForCausalLM",
        {
            "head_dim": 32, "tie_word_embeddings": True, "sliding_window": 24, "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0,
        },
        tokenizer="unigram",
        about="tied, every second layer with a window, soft limits of scores and logits",
    ),
    Case(
        "gemma3",
        "Gemma3ForCausalLM",
        {
            **_WIDE, "num_key_value_heads": 1, "tie_word_embeddings": True, "num_hidden_layers": 3,
            "sliding_window": 24, "sliding_window_pattern": 3, "query_pre_attn_scalar": 24,
            "rope_parameters": _GEMMA3_ROPE,
        },
        tokenizer="unigram",
        about="tied, multi-query, windows, two ropes",
    ),
    Case("gemma3-full", "Gemma3ForCausalLM", {"head_dim": 16, "layer_types": ["full_attention"] * 2},
         is_converted=False),
    Case("phi-2", "PhiForCausalLM", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}, "float16",
         about="half of each head turns, biases everywhere"),
    Case("phi-grouped", "PhiForCausalLM", {"hidden_act": "gelu",
         "rope_parameters": {**_THETA, "partial_rotary_factor": 0.25}}, is_converted=False),
    Case("phi-3", "Phi3ForCausalLM", {"sliding_window": 24, "pad_token_id": 0}, tokenizer="sentencepiece",
         about="windows", has_custom_code=True),
    Case(
        "phi-4-mini",
        "Phi3ForCausalLM",
        {"pad_token_id": 0, "tie_word_embeddings": True, "max_position_embeddings": 1024,
         "original_max_position_embeddings": 256, "rope_parameters": _LONGROPE},
        about="tied, longrope, three quarters of each head turn",
    ),
    Case("falcon-rw", "FalconForCausalLM", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True,
         "tie_word_embeddings": True}, about="tied, ALiBi, biases everywhere"),
    Case("falcon-7b", "FalconForCausalLM", {"tie_word_embeddings": True}, about="tied, multi-query",
         has_custom_code=True),
    Case("falcon-40b", "FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2,
         "num_attention_heads": 8}, about="grouped heads"),
    Case("falcon-one-norm", "FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2,
         "num_ln_in_parallel_attn": 1}, is_converted=False),
    Case("falcon-six-heads", "FalconForCausalLM", {"alibi": True, "multi_query": False, "num_attention_heads": 6,
         "hidden_size": 96}, is_converted=False),
    Case("openelm", "OpenELMForCausalLM", {"num_query_heads": [3, 6, 4], "num_kv_heads": [1, 2, 4], "head_dim": 16,
         "ffn_multipliers": [0.5, 1.7, 2.25], "ffn_dim_divisor": 16, "num_hidden_layers": 3,
         "tie_word_embeddings": True}, tokenizer="sentencepiece",
         about="tied, other heads and sizes in every layer", has_custom_code=True),
    Case("openelm-plain", "OpenELMForCausalLM", {"num_query_heads": [4, 2], "num_kv_heads": [2, 1], "head_dim": 32,
         "ffn_multipliers": [0.49, 1.0], "ffn_dim_divisor": 48, "ffn_with_glu": False,
         "normalize_qk_projections": False}, is_converted=False),
    Case("smollm3", "SmolLM3ForCausalLM", {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "pad_token_id": 0,
         "tie_word_embeddings": True}, about="tied, a layer without positions"),
    Case("granite", "GraniteForCausalLM", {"embedding_multiplier": 1.5, "logits_scaling": 0.8, "mlp_bias": True,
         "residual_multiplier": 0.7, "attention_multiplier": 0.2, "attention_bias": True}, about="factors, biases"),
    Case("lfm2", "Lfm2ForCausalLM", {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"],
         "block_multiple_of": 16, "tie_word_embeddings": True, "pad_token_id": 0}, about="tied, short convolutions"),
    Case("lfm2-biased", "Lfm2ForCausalLM", {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"],
         "block_auto_adjust_ff_dim": False, "conv_bias": True, "pad_token_id": 0}, is_converted=False),
    Case("gemma4", "Gemma4ForCausalLM", {**_GEMMA4, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
         about="tied, two sizes of heads"),
    Case("gemma4-shared", "Gemma4ForCausalLM", {**_GEMMA4, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
         "vocab_size_per_layer_input": 512, "use_double_wide_mlp": True},
         about="tied, shared caches, inputs per layer"),
    Case("gemma3n", "Gemma3nForCausalLM", {"head_dim": 16, "hidden_size_per_layer_input": 8, "laurel_rank": 8,
         "vocab_size_per_layer_input": 512, "num_kv_shared_layers": 2, "sliding_window": 24, "num_hidden_layers": 4,
         "layer_types": ["sliding_attention", "full_attention"] * 2, "tie_word_embeddings": True,
         "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]}, about="tied, several streams, shared caches"),
    Case("gpt2", "GPT2LMHeadModel", _GPT2, "float32", about="tied, learned positions, transposed matrices"),
    Case("gpt2-unscaled", "GPT2LMHeadModel", {**_GPT2, "scale_attn_weights": False, "n_inner": 96,
         "activation_function": "gelu"}, is_converted=False),
    *(Case(each.name, each.architecture, {"pad_token_id": 0, **_AS_BUILT.get(each.name, {})},
           about="windows in some layers" if "layer_types" in _AS_BUILT.get(each.name, {}) else "")
      for each in AS_BUILT),
)  # fmt: skip


def find_case(name: str) -> Case:
    """Return the case of a name."""
    return next(case for case in CASES if case.name == name)
