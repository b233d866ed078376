"""The re-authored model computes what transformers computes, for every choice a config.json has; no conversion."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from litert_torch.generative.layers import kv_cache
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from service.errors import ArchitectureUnsupported, CheckpointInvalid
from tests.checkpoints import LLAMA3_ROPE_SCALING, write_checkpoint
from workers.convert import architectures, reauthored
from workers.convert.architectures import Rope

CONTEXT_LENGTH = 128
TOKENS = torch.randint(0, 512, (1, 100), generator=torch.Generator().manual_seed(1), dtype=torch.int)


def compute_ours(checkpoint: Path) -> torch.Tensor:
    """Return the re-authored model's logits: float32 [1, 100, vocabulary]."""
    shape = architectures.read_shape(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))
    model = reauthored.build_model(checkpoint, shape, CONTEXT_LENGTH)
    length = TOKENS.shape[1]
    cache = kv_cache.KVCache.from_model_config(CONTEXT_LENGTH, model.config, kv_layout=kv_cache.KV_LAYOUT_TRANSPOSED)
    mask = torch.triu(torch.full((length, CONTEXT_LENGTH), float("-inf")), 1)[None, None]
    logits: torch.Tensor = model(TOKENS, torch.arange(length, dtype=torch.int), cache, mask=mask)["logits"]
    return logits


@torch.no_grad()
def compute_theirs(checkpoint: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    logits: torch.Tensor = model(TOKENS.long()).logits
    return logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "float16", "shard_size": "50KB"},
        {"dtype": "float32"},
        {"config": {"tie_word_embeddings": True}},
        {"config": {"head_dim": 32}},
        {"config": {"num_key_value_heads": 4}},
        {"config": {"num_key_value_heads": 1}},
        {"config": {"attention_bias": True, "mlp_bias": True}},
        {"config": {"rms_norm_eps": 0.1}},
        {"config": {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}},
        {"config": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}}},
        {"config": {"rope_parameters": {**LLAMA3_ROPE_SCALING, "rope_theta": 500_000.0}}},
    ],
    ids=lambda options: json.dumps(options),
)
def test_logits_equal_those_of_transformers(options: Mapping[str, Any], tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, tokenizer=None, **options)
    expected = compute_theirs(checkpoint)
    torch.testing.assert_close(compute_ours(checkpoint), expected, rtol=0, atol=1e-4)


def test_mistral_equals_llama_within_its_window(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=CONTEXT_LENGTH, initializer_range=0.2,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    expected = compute_theirs(tmp_path)
    torch.testing.assert_close(compute_ours(tmp_path), expected, rtol=0, atol=1e-4)


def test_weights_of_another_seed_give_other_logits(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "first", tokenizer=None, seed=0)
    second = write_checkpoint(tmp_path / "second", tokenizer=None, seed=1)
    assert (compute_ours(first) - compute_theirs(second)).abs().max() > 1.0


def test_old_checkpoints_may_store_wavelengths(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, tokenizer=None)
    expected = compute_ours(checkpoint)
    change_weights(checkpoint, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert torch.equal(compute_ours(checkpoint), expected)


def test_a_stored_copy_of_tied_embeddings_is_accepted(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, tokenizer=None, config={"tie_word_embeddings": True})
    expected = compute_ours(checkpoint)
    embedding = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    change_weights(checkpoint, {"lm_head.weight": embedding.clone()})
    assert torch.equal(compute_ours(checkpoint), expected)


def change_weights(checkpoint: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    """Add, replace or (None) remove tensors of a checkpoint with one weights file."""
    path = checkpoint / "model.safetensors"
    tensors: dict[str, torch.Tensor | None] = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, r"no tensor 'model\.norm\.weight'"),
        ({"model.layers.1.self_attn.q_proj.weight": None}, r"no tensor 'model\.layers\.1\.self_attn\.q_proj\.weight'"),
        ({"model.norm.weight": torch.ones(63)}, r"'model\.norm\.weight' has shape \[63\]; config.json demands \[64\]"),
        ({"model.norm.weight": torch.ones(64, dtype=torch.int8)}, r"is torch\.int8"),
        ({"model.norm.weight": torch.full((64,), torch.nan)}, "holds NaN or infinity"),
        ({"model.norm.weight": torch.full((64,), torch.inf)}, "holds NaN or infinity"),
        ({"model.layers.2.input_layernorm.weight": torch.ones(64)}, "1 tensors that config.json gives no place"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(
    changes: Mapping[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(tmp_path, tokenizer=None)
    change_weights(checkpoint, changes)
    with pytest.raises(CheckpointInvalid, match=message):
        compute_ours(checkpoint)


def test_tied_embeddings_with_another_output_matrix_are_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, tokenizer=None, config={"tie_word_embeddings": True})
    change_weights(checkpoint, {"lm_head.weight": torch.ones(512, 64)})
    with pytest.raises(CheckpointInvalid, match="ties the embeddings"):
        compute_ours(checkpoint)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, tokenizer=None, shard_size="50KB")
    shard = min(checkpoint.glob("model-00002-of-*.safetensors"))
    shard.unlink()
    with pytest.raises(CheckpointInvalid, match=f"{shard.name} is missing"):
        compute_ours(checkpoint)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, tokenizer=None)
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointInvalid, match=r"model\.safetensors is not a valid safetensors file"):
        compute_ours(checkpoint)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, tokenizer=None, shard_size="50KB")
    first, second = sorted(checkpoint.glob("model-*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second)
    with pytest.raises(CheckpointInvalid, match="stands in two files"):
        compute_ours(checkpoint)


def test_a_rope_without_a_formula_is_refused() -> None:
    with pytest.raises(ArchitectureUnsupported, match="no rope of kind 'yarn'"):
        reauthored.compute_frequencies(Rope(1e4, "yarn"), 16)  # type: ignore[arg-type]
